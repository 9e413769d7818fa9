"""LLM: prompts in, RequestOutputs out. The offline API, with vLLM's names."""

import collections
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxengine.config import EngineConfig
from jaxengine.distributed.launch import start_leader
from jaxengine.engine.build import check_hf_config
from jaxengine.engine.engine import StepResult
from jaxengine.engine.garbage_collection import (
    exempt_from_garbage_collection,
    paused_garbage_collection,
)
from jaxengine.engine.replicas import build_replicas, startup_text
from jaxengine.fair_lock import FairLock
from jaxengine.interrupts import interrupts_deferred
from jaxengine.outputs import RequestOutput
from jaxengine.process import prepare_process
from jaxengine.sampling_params import RequestOutputKind, SamplingParams
from jaxengine.structured.constraint import TokenConstraint
from jaxengine.structured.constraint_factory import ConstraintFactory
from jaxengine.structured.reasoning import markers_of
from jaxengine.text.messages import split_conversations
from jaxengine.text.output_processor import OutputProcessor
from jaxengine.text.progress import Progress
from jaxengine.text.prompts import EncodedPrompt, Prompt, as_list, checked, parse_prompt
from jaxengine.text.tokenizer import ChatOptions, Message, Tokenizer, load_tokenizer
from jaxengine.weights import Checkpoint, open_model

Params = SamplingParams | Sequence[SamplingParams] | None
Inbox = collections.deque[RequestOutput | BaseException]

# Fields of generation_config.json that are sampling parameters too.
_DEFAULT_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


class LLM:
    """A model that generates text for many prompts at once.

    Its methods may be called from several threads; their requests share the batch.

    Args:
        model: Hub name, HF directory, GGUF file, or a directory that ``jaxengine-convert`` wrote.
        tokenizer: The same choice for the tokenizer; None takes the model's own.
        engine_args: Fields of ``EngineConfig``, in vLLM's spelling.

    Raises:
        ValueError: If the model is not supported or damaged, or does not fit into memory.
    """

    def __init__(self, model: str, tokenizer: str | None = None, **engine_args: Any) -> None:
        started = time.perf_counter()
        config = EngineConfig(model=os.fspath(model), tokenizer=tokenizer, **engine_args)
        markers_of(config.reasoning_parser)  # refused before anything is loaded
        prepare_process(config)
        checkpoint = open_model(
            config.model, config.load_format, config.revision, config.hf_overrides
        )
        check_hf_config(checkpoint.hf_config)
        generation_config = checkpoint.generation_config
        leader = None if config.nnodes == 1 else start_leader(config, checkpoint.hf_config)
        self._tokenizer: Tokenizer | None = None
        eos_token_ids = frozenset(checkpoint.eos_token_ids)
        if not config.skip_tokenizer_init:
            self._tokenizer = _load_tokenizer(checkpoint, tokenizer)
            eos_token_ids |= self._tokenizer.eos_token_ids
        if leader is None:
            self.engine, startups = build_replicas(config, checkpoint, eos_token_ids)
        else:
            with leader.closed_on_failure():
                self.engine, startups = build_replicas(
                    config, checkpoint, eos_token_ids, leader.hooks
                )
                leader.wait_until_ready()
        self.startup = startups[0]
        self.engine_config = config
        self._generation_config = generation_config if config.generation_config == "auto" else {}
        self._processor = OutputProcessor(self._tokenizer)
        self._constraints: ConstraintFactory | None = None  # until a request needs one
        self._request_numbers = itertools.count()
        self._inboxes: dict[str, Inbox] = {}
        self._news: Inbox = collections.deque()  # for ``step``
        self._lock = FairLock()  # of all above: calls may come from several threads
        if leader is not None:
            leader.unfinished_requests = lambda: self._processor.unfinished_request_ids
        exempt_from_garbage_collection(owner=self)
        if not config.disable_log_stats:
            seconds = time.perf_counter() - started
            print(f"{startup_text(startups)}\n  ready after {seconds:.1f} s", file=sys.stderr)

    def get_tokenizer(self) -> Any:
        """Return the Hugging Face tokenizer.

        Raises:
            ValueError: If the model was loaded with ``skip_tokenizer_init``.
        """
        return self._require_tokenizer().hf_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the model's own defaults, from its generation_config.json."""
        found = {name: self._generation_config.get(name) for name in _DEFAULT_FIELDS}
        values = {name: value for name, value in found.items() if value is not None}
        if "max_new_tokens" in values:
            values["max_tokens"] = values.pop("max_new_tokens")
        return SamplingParams(**values)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Generate for each prompt; all of them share the batch.

        Args:
            prompts: Text, token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``; or a
                list of such.
            sampling_params: For all prompts, or one for each; None takes the model's defaults.
            use_tqdm: Draw a progress bar with the throughput.
            priority: One number a prompt, smaller first; needs ``scheduling_policy="priority"``.

        Returns:
            One output a prompt, in their order.

        Raises:
            ValueError: If a prompt or a parameter is not possible. No prompt has run then.
        """
        inputs = self._encode(as_list(prompts))
        params = self._params_for(len(inputs), sampling_params)
        priorities = [0] * len(inputs) if priority is None else list(priority)
        if len(priorities) != len(inputs):
            raise ValueError(f"{len(priorities)} priorities were given for {len(inputs)} prompts")
        final = [each.with_output_kind(RequestOutputKind.FINAL_ONLY) for each in params]
        request_ids, inbox = self._add_all(inputs, final, priorities)
        return self._run_to_end(request_ids, inbox, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, with the model's chat template.

        Args:
            messages: A list of ``{"role": ..., "content": ...}``, or a list of such lists. A
                content is text, a list of text parts, or absent.
            sampling_params: As for ``generate``.
            use_tqdm: As for ``generate``.
            chat_template: Jinja template to use instead of the model's.
            chat_template_content_format: What the template takes as content: "string", "openai" (a
                list of parts), or "auto", which reads it from the template.
            add_generation_prompt: Begin the assistant's turn at the end.
            continue_final_message: Let the model go on with the last message instead.
            tools: Function descriptions for the template.
            chat_template_kwargs: Further variables of the template; they win over the arguments.

        Raises:
            ValueError: As ``generate``; also if the template refuses a conversation.
        """
        tokenizer = self._require_tokenizer()
        arguments = {
            "chat_template": chat_template,
            "content_format": chat_template_content_format,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
        }
        options = ChatOptions.merged(arguments, chat_template_kwargs)
        prompts = [
            tokenizer.render(conversation, options)
            for conversation in split_conversations(messages)
        ]
        token_ids = tokenizer.encode_batch(prompts, add_special_tokens=False)
        inputs = [
            {"prompt": prompt, "prompt_token_ids": ids}
            for prompt, ids in zip(prompts, token_ids, strict=True)
        ]
        return self.generate(inputs, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Generate for one prompt, and give its output after every step.

        Closing the iterator early aborts the request.
        """
        (params,) = self._params_for(1, sampling_params)
        yield from self._outputs_of(*self._add_all(self._encode([prompt]), [params], [0]))

    def add_request(
        self,
        prompt: Prompt | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
    ) -> str:
        """Queue one request beside those that run; ``step`` brings its outputs.

        Args:
            prompt: As for ``generate``.
            sampling_params: None takes the model's defaults.
            messages: A conversation for the model's chat template, in place of the prompt.

        Returns:
            The request id, for ``abort_request`` and in its outputs.

        Raises:
            ValueError: If the prompt or a parameter is not possible. Nothing has changed then.
        """
        if (prompt is None) == (messages is None):
            raise ValueError("a request needs either a prompt or messages, and not both")
        if messages is not None:
            tokenizer = self._require_tokenizer()
            text = tokenizer.render_chat(messages)
            token_ids = tokenizer.encode(text, add_special_tokens=False)
            prompt = {"prompt": text, "prompt_token_ids": token_ids}
        assert prompt is not None
        (params,) = self._params_for(1, sampling_params)
        (request_id,), _ = self._add_all(self._encode([prompt]), [params], [0], self._news)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run one step, and return the new outputs of the requests of ``add_request``.

        If it raises, all of these are to be aborted; the model can be used again after that.
        """
        with self._lock:
            with interrupts_deferred():
                if not self._news:
                    self._step(self._news)
            news = list(self._news)
            self._news.clear()
            outputs = [each for each in news if isinstance(each, RequestOutput)]
            for output in outputs:
                if output.finished:
                    del self._inboxes[output.request_id]
        for each in news:
            if isinstance(each, BaseException):
                raise each
        return outputs

    def abort_request(self, request_id: str) -> None:
        """End a request of ``add_request``; no output comes for it any more."""
        self._abort_all([request_id])

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; returns False if requests still run."""
        with self._lock:
            return self.engine.reset_prefix_cache()

    def get_metrics(self) -> Any:
        """Counters of the scheduler and the KV cache (usage, waste, hits, preemptions)."""
        return self.engine.stats()

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(
                "this model was loaded with skip_tokenizer_init=True: give token ids, or load it "
                "without that flag"
            )
        return self._tokenizer

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Bring every prompt into the form (text or None, token ids)."""
        parsed = [parse_prompt(prompt) for prompt in prompts]
        texts = [each.text for each in parsed if each.token_ids is None and each.text is not None]
        encoded = iter(self._require_tokenizer().encode_batch(texts) if texts else [])
        vocab_size = self.engine.model_config.vocab_size
        return [
            EncodedPrompt(
                text, checked(number, next(encoded) if ids is None else ids, vocab_size), salt
            )
            for number, (text, ids, salt) in enumerate(parsed)
        ]

    def _params_for(self, num_prompts: int, params: Params) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            params = [params] * num_prompts
        if len(params) != num_prompts:
            raise ValueError(
                f"{len(params)} sampling_params were given for {num_prompts} prompts: give one "
                "for all, or one for each"
            )
        return [self._complete(each) for each in params]

    def _complete(self, params: SamplingParams) -> SamplingParams:
        """Check the limits that the model and the engine set, and tokenize the bad words."""
        limit, vocab_size = self.engine_config.max_logprobs, self.engine.model_config.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            wanted = vocab_size if wanted == -1 else wanted
            if wanted is not None and wanted > limit and limit != -1:
                raise ValueError(
                    f"{name} {wanted} is more than max_logprobs {limit}: ask for fewer or raise "
                    "--max-logprobs (-1 allows the whole vocabulary)"
                )
        _check_token_ids(params, vocab_size)
        if not params.bad_words:
            return params
        bad_ids = self._require_tokenizer().bad_words_token_ids(params.bad_words)
        return params.clone(bad_words_token_ids=bad_ids)

    def _constraint_maker(
        self, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> Callable[[], TokenConstraint | None]:
        """Return what makes the constraint of each output of a request.

        Raises:
            ValueError: If its grammar cannot be compiled.
        """
        if params.structured_outputs is None and params.thinking_token_budget is None:
            return lambda: None
        return self._constraint_factory().maker(params, prompt_token_ids)

    def _constraint_factory(self) -> ConstraintFactory:
        if self._constraints is None:
            self._constraints = ConstraintFactory(
                self._require_tokenizer().hf_tokenizer,
                self.engine.model_config.vocab_size,
                self.engine.eos_token_ids,
                reasoning_parser=self.engine_config.reasoning_parser,
            )
        return self._constraints

    def _add_all(
        self,
        inputs: Sequence[EncodedPrompt],
        params: Sequence[SamplingParams],
        priorities: Sequence[int],
        inbox: Inbox | None = None,
    ) -> tuple[list[str], Inbox]:
        """Queue all prompts, or none of them if one is refused.

        Args:
            inputs: The prompts.
            params: One for each.
            priorities: One for each.
            inbox: Where their outputs are put; None makes a new one.

        Returns:
            Their request ids, and the inbox.
        """
        for each in params:  # side by side, before the first is waited for
            if each.structured_outputs is not None:
                self._constraint_factory().prepare(each)
        makers = [
            self._constraint_maker(each, prompt.token_ids)
            for prompt, each in zip(inputs, params, strict=True)
        ]
        request_ids: list[str] = []
        inbox = collections.deque() if inbox is None else inbox
        with self._lock:
            try:
                for request in zip(inputs, params, priorities, makers, strict=True):
                    request_id = str(next(self._request_numbers))
                    request_ids.append(request_id)
                    self._inboxes[request_id] = inbox
                    self._add(request_id, *request)
            except BaseException:
                self._abort_all(request_ids)
                raise
        return request_ids, inbox

    def _add(
        self,
        request_id: str,
        prompt: EncodedPrompt,
        params: SamplingParams,
        priority: int,
        new_constraint: Callable[[], TokenConstraint | None],
    ) -> None:
        text, token_ids, cache_salt = prompt
        children = self._processor.add_request(request_id, text, token_ids.tolist(), params)
        for child in children:
            self.engine.add_request(
                child.request_id,
                token_ids,
                child.sampling_params,
                priority=priority,
                constraint=new_constraint(),
                cache_salt=cache_salt,
            )

    def _abort_all(self, request_ids: Sequence[str]) -> None:
        with self._lock:
            for request_id in request_ids:
                self._inboxes.pop(request_id, None)
                for child_id in self._processor.abort(request_id):
                    self.engine.abort(child_id)

    def _outputs_of(self, request_ids: Sequence[str], inbox: Inbox) -> Iterator[RequestOutput]:
        """Step until these are finished; leaving earlier, for whatever reason, aborts them.

        Several callers may take turns (threads, open streams): each gets its own outputs.
        """
        num_unfinished = len(request_ids)
        try:
            while num_unfinished:
                output = self._next_output(inbox)
                num_unfinished -= output.finished
                yield output
        finally:
            self._abort_all(request_ids)

    def _next_output(self, inbox: Inbox) -> RequestOutput:
        while not inbox:
            with self._lock:  # each step anew, so that those who wait get their turn
                if inbox:
                    break
                with interrupts_deferred():
                    if not self.engine.has_unfinished_requests:
                        raise RuntimeError(
                            "a request ended without an output: it was aborted elsewhere"
                        )
                    self._step(inbox)
        news = inbox.popleft()
        if isinstance(news, BaseException):
            raise news
        return news

    @paused_garbage_collection()  # what a step makes is gone when it returns
    def _step(self, own: Inbox) -> None:
        """Run one step of the engine; put the outputs that it changed into their inboxes.

        If it fails, every request has ended: the caller gets the error itself, and the inboxes of
        all others one that names it.
        """
        try:
            self._process(self.engine.step())
        except BaseException as error:
            for inbox in {id(each): each for each in self._inboxes.values()}.values():
                if inbox is not own:
                    failure = RuntimeError(f"a step of the engine has failed: {error!r}")
                    failure.__cause__ = error
                    inbox.append(failure)
            raise

    def _process(self, result: StepResult) -> None:
        if (step := result.step) is None:
            return
        if step.prompt_scores is not None:
            for chunk, arrays in step.prompt_scores.on_host():
                self._processor.add_prompt_logprobs(chunk.request_id, chunk.start, arrays)
        processed = self._processor.process(result.outputs, step.logprobs())
        for stopped in processed.stopped:
            self.engine.finish(stopped.request_id, stopped.stop_reason)
        for output in processed.request_outputs:
            self._inboxes[output.request_id].append(output)

    def _run_to_end(
        self, request_ids: Sequence[str], inbox: Inbox, use_tqdm: bool
    ) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        with Progress(len(request_ids), disable=not use_tqdm) as progress:
            for output in self._outputs_of(request_ids, inbox):
                finished[output.request_id] = output
                progress.update(output)
        return [finished[request_id] for request_id in request_ids]


def _check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids", "logprob_token_ids"):
        outside = [i for i in getattr(params, name) or () if not 0 <= i < vocab_size]
        if outside:
            raise ValueError(
                f"{name} holds {outside[0]}, which is not in the vocabulary of {vocab_size}: use "
                "ids of this model's tokenizer"
            )


def _load_tokenizer(checkpoint: Checkpoint, tokenizer: str | None) -> Tokenizer:
    """Load the tokenizer named, or the one that lies with the model."""
    generation_config = {"eos_token_id": checkpoint.eos_token_ids}
    if tokenizer is not None and not tokenizer.endswith(".gguf"):
        return load_tokenizer(tokenizer, generation_config=generation_config)
    source = checkpoint if tokenizer is None else open_model(tokenizer)
    with tempfile.TemporaryDirectory(prefix="jaxengine-tokenizer-") as directory:
        source.write_tokenizer(Path(directory))
        return load_tokenizer(directory, generation_config=generation_config)
