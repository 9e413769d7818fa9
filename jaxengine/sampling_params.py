"""What a user may ask of the sampler, with vLLM's names, defaults and bounds.

Standard library only. A ``SamplingParams`` is checked once, when it is made, so
nothing behind it has to doubt its values. Limits that need the model or the
tokenizer (token ids, ``max_logprobs``) are checked where those are known.
"""

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from jaxengine.compat.sampling_fields import takes_former_fields
from jaxengine.structured.params import StructuredOutputsParams, as_params

MAX_NUM_SEQS_PER_PROMPT = 16384  # vLLM's VLLM_MAX_N_SEQUENCES
MAX_BAD_WORDS = 128
MAX_LOGPROB_TOKEN_IDS = 128
MIN_TEMPERATURE = 0.01  # smaller ones overflow float16 logits; vLLM raises them too
MAX_LOGIT_BIAS = 100.0
FLOAT_FIELDS = (
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("temperature", "top_p", "min_p"),
)
INT_FIELDS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")


class RequestOutputKind(enum.Enum):
    """What each ``RequestOutput`` of a request holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last one
    FINAL_ONLY = 2  # nothing until the request ends


@takes_former_fields
@dataclass
class SamplingParams:
    """Sampling parameters of one request.

    Only ``n`` may be given by position: vLLM has moved the order of the others more than once.

    Args:
        n: Outputs per prompt. Must be 1 when greedy: they would all be equal.
        presence_penalty: Taken from the logit of each token already generated. In [-2, 2].
        frequency_penalty: The same, times how often it was generated. In [-2, 2].
        repetition_penalty: Divides positive and multiplies negative logits of the tokens
            in the prompt and the output. Above 0; 1 means off.
        temperature: 0 is greedy, and then top_p, top_k and min_p have no effect. Values
            between 0 and 0.01 are raised to 0.01.
        top_p: Keep the smallest set of tokens whose probability reaches this. In (0, 1].
        top_k: Keep this many most likely tokens; 0 or -1 keeps all.
        min_p: Drop tokens less likely than this fraction of the most likely one. In [0, 1].
        seed: Seed of the request's own random stream, an integer of 64 bits with or without a
            sign; None or -1 lets the engine pick one.
        stop: Strings that end the output, which is cut before them.
        stop_token_ids: Tokens that end the output; they stay in ``token_ids``.
        ignore_eos: Do not end at the model's end-of-sequence tokens.
        max_tokens: Longest output; None means up to the model's limit.
        min_tokens: Stop tokens and stop strings are ignored before this many tokens.
        logprobs: Also return this many top logprobs per output token; -1 means all.
        prompt_logprobs: The same for the tokens of the prompt.
        flat_logprobs: Return logprobs as ``FlatLogprobs``: a few lists, however many tokens.
        skip_reading_prefix_cache: Compute the whole prompt, whatever is cached of it.
        detokenize: Produce text.
        skip_special_tokens: Leave special tokens out of the text.
        spaces_between_special_tokens: Put spaces between special tokens in the text.
        include_stop_str_in_output: Cut the text behind the stop string, not before it.
        output_kind: What each ``RequestOutput`` holds.
        logit_bias: Token id -> value added to its logit, clamped to [-100, 100].
        allowed_token_ids: The only tokens that may be sampled.
        bad_words: Texts that must not be generated: the last token of each is masked
            where the output ends with the tokens before it.
        logprob_token_ids: Return the logprobs of exactly these tokens and of the sampled one.
        structured_outputs: The form that the output must have, ``StructuredOutputsParams`` or a
            mapping of its fields. ``guided_decoding`` is its older name.
        thinking_token_budget: Most tokens of reasoning, which is then ended; None or -1 for no
            limit. Needs ``reasoning_parser``.
        extra_args: Passed through for plugins.
        bad_words_token_ids: ``bad_words`` as token ids; filled in by the front end.

    Raises:
        ValueError: If a value is outside its bounds.
    """

    n: int = 1
    _: KW_ONLY
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    skip_reading_prefix_cache: bool | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logprob_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    guided_decoding: Any = field(default=None, repr=False)
    thinking_token_budget: int | None = None
    extra_args: Mapping[str, Any] | None = None
    bad_words_token_ids: list[list[int]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Bring the values into one form and check them."""
        self._normalize()
        self._check_numbers()
        self._check_lengths()
        self._check_tokens()
        self._check_text()
        _check_integers("extra_args", self.extra_args)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def num_logprobs(self) -> int | None:
        """How many top logprobs an output token needs; None if no logprobs are asked."""
        return 0 if self.logprob_token_ids else self.logprobs

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none of them empty."""
        return tuple(self.stop or ())

    @property
    def all_stop_token_ids(self) -> frozenset[int]:
        """The stop tokens of the user; the model's own end tokens are the request's."""
        return frozenset(self.stop_token_ids or ())

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens so far."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )

    @property
    def is_truncated(self) -> bool:
        """Whether top_k, top_p or min_p can remove a token."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    def clone(self, **changes: Any) -> "SamplingParams":
        """Return a copy that shares nothing with this one, checked again if fields change.

        Args:
            changes: Field name -> new value.
        """
        if not changes:
            return deepcopy(self)
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in changes}
        return type(self)(**deepcopy(kept), **changes)

    def for_output(self, index: int) -> "SamplingParams":
        """Return what the engine computes for one of the ``n`` outputs: one output, seed + index.

        The values were checked before; a seed at the end of its range goes on at the other end.
        """
        child = copy(self)
        child.n = 1
        if self.seed is not None:
            child.seed = (self.seed + index) % 2**64
        if index > 0:
            child.prompt_logprobs = None  # they are computed once
        return child

    @classmethod
    def from_optional(cls, **values: Any) -> "SamplingParams":
        """Make parameters from values of which None stands for the default."""
        # None is a value of max_tokens: as many as the model can.
        return cls(**{k: v for k, v in values.items() if v is not None or k == "max_tokens"})

    def with_seed(self, seed: int) -> "SamplingParams":
        """Return a copy with the seed that the engine has picked."""
        changed = copy(self)
        changed.seed = seed
        return changed

    def with_output_kind(self, output_kind: RequestOutputKind) -> "SamplingParams":
        """Return a copy that differs in what the caller gets, which needs no further check."""
        changed = copy(self)
        changed.output_kind = output_kind
        return changed

    def __repr__(self) -> str:
        """Show only what differs from the defaults."""
        shown = (f for f in fields(self) if f.repr and getattr(self, f.name) not in (f.default, []))
        return f"SamplingParams({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def _normalize(self) -> None:
        self._normalize_structured_outputs()
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            token_ids = getattr(self, name)
            if token_ids is not None:
                setattr(self, name, [_plain_int(token_id) for token_id in token_ids])
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or ()))
        for name in FLOAT_FIELDS:
            setattr(self, name, _number(name, getattr(self, name)))
        for name in INT_FIELDS:
            setattr(self, name, _plain_int(getattr(self, name)))
        self.seed = None if self.seed == -1 else self.seed
        self.top_k = 0 if self.top_k == -1 else self.top_k
        self.logprobs = _count_of(self.logprobs)
        self.prompt_logprobs = _count_of(self.prompt_logprobs)
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            self.temperature = MIN_TEMPERATURE
        if self.logit_bias is not None:
            self.logit_bias = _clamped_bias(self.logit_bias)
        bad_words = [self.bad_words] if isinstance(self.bad_words, str) else self.bad_words
        self.bad_words = None if bad_words is None else list(dict.fromkeys(bad_words))

    def _normalize_structured_outputs(self) -> None:
        if self.guided_decoding is not None:
            if self.structured_outputs is not None:
                raise ValueError(
                    "guided_decoding is the older name of structured_outputs: give one of the two"
                )
            self.structured_outputs, self.guided_decoding = self.guided_decoding, None
        if self.structured_outputs is not None:
            self.structured_outputs = as_params(self.structured_outputs)
        budget = _plain_int(self.thinking_token_budget)
        self.thinking_token_budget = None if budget == -1 else budget
        if self.thinking_token_budget is not None:
            _check_int("thinking_token_budget", budget, 0, "use None or -1 for no limit")

    def _check_numbers(self) -> None:
        for name, low, high in (
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("min_p", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
        if not self.repetition_penalty > 0.0:
            raise ValueError(
                f"repetition_penalty must be above 0 (1 means off), got {self.repetition_penalty}"
            )
        if self.temperature < 0.0:
            raise ValueError(
                f"temperature must be 0 (greedy) or more, got {self.temperature}; "
                "use 0 for the most likely token"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; 1 means off")
        _check_int("top_k", self.top_k, 0, "use 0 or -1 to keep all tokens")
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), "use an integer of 64 bits")
        if self.is_greedy:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0

    def _check_lengths(self) -> None:
        _check_int("n", self.n, 1, "ask for at least one output")
        if self.n > MAX_NUM_SEQS_PER_PROMPT:
            raise ValueError(
                f"n must be at most {MAX_NUM_SEQS_PER_PROMPT}, got {self.n}; split the prompt "
                "into several requests"
            )
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n must be 1 when temperature is 0, got {self.n}: all outputs would be equal; "
                "set a temperature above 0"
            )
        _check_int("min_tokens", self.min_tokens, 0, "use 0 for no minimum")
        if self.max_tokens is None:
            return
        _check_int("max_tokens", self.max_tokens, 1, "use None for up to the model's limit")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) must not be above max_tokens ({self.max_tokens})"
            )

    def _check_tokens(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, -1, "use -1 for the whole vocabulary")
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            value = getattr(self, name)
            if value is not None:
                _check_token_ids(name, value)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must not be empty; use None to allow all tokens")
        if self.logprob_token_ids is not None:
            self._check_logprob_token_ids(self.logprob_token_ids)

    def _check_logprob_token_ids(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            self.logprob_token_ids = None
        elif self.logprobs is not None and self.logprobs != len(token_ids):
            raise ValueError(
                f"logprobs is {self.logprobs} beside {len(token_ids)} logprob_token_ids: leave "
                "logprobs out, as the scores of these tokens come in place of the most likely ones"
            )
        if len(token_ids) > MAX_LOGPROB_TOKEN_IDS:
            raise ValueError(
                f"logprob_token_ids holds {len(token_ids)} ids, the limit is "
                f"{MAX_LOGPROB_TOKEN_IDS}; use logprobs=-1 for the whole vocabulary"
            )

    def _check_text(self) -> None:
        for stop in self.stop or ():
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop must hold non-empty strings, got {stop!r}")
        if self.stop and not self.detokenize:
            raise ValueError(
                "stop strings are found in the text, so they need detokenize=True; "
                "use stop_token_ids without text"
            )
        bad_words = self.bad_words or ()
        if len(bad_words) > MAX_BAD_WORDS:
            raise ValueError(f"bad_words holds {len(bad_words)} texts, limit {MAX_BAD_WORDS}")
        for word in bad_words:
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"bad_words must hold non-empty strings, got {word!r}")


def _check_integers(name: str, value: Any) -> None:
    """Refuse integers that no message to another process can carry, however deep they lie."""
    if isinstance(value, Mapping):
        for each in (*value.keys(), *value.values()):
            _check_integers(name, each)
    elif isinstance(value, list | tuple):
        for each in value:
            _check_integers(name, each)
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} holds {value}: integers must fit in 64 bits")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _plain_int(value: Any) -> Any:
    """Turn the integers of numpy into Python's; anything else stays, to be refused later."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _count_of(value: Any) -> Any:
    """Read the OpenAI spelling ``True`` as one logprob and ``False`` as none."""
    if isinstance(value, bool):
        return 1 if value else None
    return value


def _check_int(name: str, value: Any, minimum: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}; {remedy}")
    if value >= 2**64:
        raise ValueError(f"{name} must fit in 64 bits, got {value}; {remedy}")


def _check_token_ids(name: str, token_ids: Iterable[Any]) -> None:
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise ValueError(f"{name} must hold token ids (integers from 0), got {token_id!r}")


def _clamped_bias(logit_bias: Mapping[Any, Any]) -> dict[int, float]:
    """Token ids as integers (JSON has only string keys), values within +-100."""
    clamped = {}
    for key, value in logit_bias.items():
        try:
            token_id = int(key)
        except (TypeError, ValueError):
            raise ValueError(f"logit_bias keys must be token ids, got {key!r}") from None
        _check_token_ids("logit_bias", [token_id])
        if value in (math.inf, -math.inf):  # an absolute ban or wish, as strong as there is one
            value = math.copysign(MAX_LOGIT_BIAS, value)
        bias = _number(f"logit_bias of token {token_id}", value)
        clamped[token_id] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, bias))
    return clamped
