"""Frontend: what stands between users and an engine. Text in, token ids; token ids in, text.

The offline API and the HTTP server use it alike, each in its own process.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxengine.engine_client import EngineInfo
from jaxengine.llm_arguments import Params, as_params, check_logprobs, check_token_ids
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.messages import Message
from jaxengine.text.output_processor import OutputProcessor
from jaxengine.text.prompts import (
    EncodedPrompt,
    Prompt,
    TokenizationOptions,
    checked,
    parse_prompt,
)
from jaxengine.text.tokenizer import ChatOptions, Tokenizer, required


class Frontend:
    """Prepares requests for one engine, and makes outputs of its tokens.

    Args:
        tokenizer: The model's; None if it was not loaded.
        info: What the engine is.
        chat_template: Jinja source to use instead of the model's template.

    Attributes:
        processor: Makes outputs of tokens; for one thread at a time.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, info: EngineInfo, chat_template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.info = info
        self.chat_template = chat_template
        self.processor = OutputProcessor(tokenizer)

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ValueError: If there is none.
        """
        return required(self.tokenizer)

    def default_params(self) -> SamplingParams:
        """Return the model's own sampling parameters, from its generation_config.json."""
        return SamplingParams(**self.info.sampling_defaults)

    def encode(
        self, prompts: Sequence[Prompt], tokenization_kwargs: Mapping[str, Any] | None = None
    ) -> list[EncodedPrompt]:
        """Bring every prompt into one form: text or None, token ids, cache salt.

        Raises:
            ValueError: If one is no prompt, or holds a token that the model does not have.
        """
        options = TokenizationOptions.of(tokenization_kwargs)
        parsed = [parse_prompt(prompt) for prompt in prompts]
        texts = [each.text for each in parsed if each.token_ids is None and each.text is not None]
        encoded: Iterator[Sequence[int]] = iter(())
        if texts:
            tokenizer = self.require_tokenizer()
            encoded = iter(tokenizer.encode_batch(texts, options.add_special_tokens))
        inputs = []
        for number, (text, ids, salt) in enumerate(parsed):
            ids = options.truncated(next(encoded) if ids is None else ids, self.info.max_model_len)
            token_ids = checked(number, ids, self.info.vocab_size)
            inputs.append(EncodedPrompt(text, token_ids, salt))
        return inputs

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """Write a conversation as the model's prompt.

        Raises:
            ValueError: If there is no template, or it refuses the messages.
        """
        return self.require_tokenizer().render(messages, options)

    def params_for(self, num_prompts: int, params: Params) -> list[SamplingParams]:
        """Complete the parameters of each prompt, before any of them is queued.

        Raises:
            ValueError: If there are not as many as prompts, or one is not possible.
        """
        if params is None:
            params = self.default_params()
        if isinstance(params, SamplingParams):  # of all prompts: completed once
            return as_params(self.complete(params), num_prompts)
        return [self.complete(each) for each in as_params(params, num_prompts)]

    def complete(self, params: SamplingParams) -> SamplingParams:
        """Check the limits that the model and the engine set, and tokenize the bad words.

        Raises:
            ValueError: If a limit is passed.
        """
        check_logprobs(params, self.info.max_logprobs, self.info.vocab_size)
        check_token_ids(params, self.info.vocab_size)
        if not params.bad_words:
            return params
        bad_ids = self.require_tokenizer().bad_words_token_ids(params.bad_words)
        return params.clone(bad_words_token_ids=bad_ids)

    def check_length(self, prompt: EncodedPrompt) -> None:
        """Refuse here what the engine would refuse later.

        Raises:
            ValueError: If the prompt is empty, or leaves no room for output.
        """
        num_tokens, longest = len(prompt.token_ids), self.info.max_model_len
        if not num_tokens:
            raise ValueError("the prompt is empty; give at least one token")
        if num_tokens >= longest:
            raise ValueError(
                f"This model's maximum context length is {longest} tokens, and the prompt has "
                f"{num_tokens}, which leaves no room for output: shorten it, or ask for "
                "truncate_prompt_tokens"
            )
        if num_tokens > self.info.max_prompt_len:
            raise ValueError(
                f"the prompt has {num_tokens} tokens, and the KV cache has room for "
                f"{self.info.max_prompt_len}: shorten it"
            )
