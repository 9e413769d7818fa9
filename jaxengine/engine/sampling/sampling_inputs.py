"""Sampling parameters on their way to the device: one int32 vector per step.

``SamplingState`` keeps the parameters of every slot in numpy arrays, filled when a
request is admitted. Each step gathers the rows of the batch from them and packs what
the step needs, and nothing else, into one vector that the runner sends with its own
integers. What is in the vector follows from ``SamplerVariant``, the static description
of the batch for which XLA compiles the sampler.

The lengths of lists (history, biases, ...) are rounded up to a few buckets, or each step
would compile anew. Their unused entries name row B, which ``mode="drop"`` leaves out;
-1 would be the last row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxengine.engine.sampling.sampling_extras import LIST_FIELDS, Entries, SlotExtras, needs_extras
from jaxengine.sampling_params import SamplingParams

MAX_SMALL_TOP_K = 64  # a top_k up to this is found without searching the vocabulary
LIST_BUCKETS = (256, 4096, 32768, 262144, 2097152, 16777216)
MASK_BUCKETS = (4, 32, 256)  # rows that a mask is sent for; more: one for each row
LOGPROB_BUCKETS = (0, 5, 20)
LOGPROB_ID_BUCKETS = (0, 16, 128)
RAW_LOGPROBS = "raw_logprobs"
NO_LOGPROBS = -2  # of a slot that wants none; -1 is the whole vocabulary
SLOT_FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
SLOT_INTS = ("top_k", "seed_high", "seed_low")
FLOAT_FIELDS = frozenset((*SLOT_FLOATS, "bias_values"))


class RowLike(Protocol):
    """What is read of a ``ScheduledRow``."""

    request: Any
    num_scheduled_tokens: int
    num_computed_tokens: int
    samples_token: bool


@dataclass(frozen=True)
class SamplerVariant:
    """What the sampler must do for a batch: static, so that XLA leaves the rest out.

    Attributes:
        random: Some row is not greedy.
        small_top_k: Some row has a top_k of at most MAX_SMALL_TOP_K.
        only_small_top_k: So has every row that is not greedy: the rest of the vocabulary
            need not be looked at.
        top_k: Some row has a larger top_k.
        top_p: Some row has a top_p below 1.
        min_p: Some row has a min_p above 0.
        logprobs: Some row wants the logprob of its token.
        num_logprobs: Top logprobs per row; -1 is the whole vocabulary.
        num_logprob_ids: Width of ``logprob_token_ids``.
        num_history: Room for history entries; above 0 means penalties.
        num_biases: Room for sparse logit changes (logit_bias, min_tokens).
        num_bad_words: Room for bad words.
        num_allowed: Room for allowed token ids.
        logprobs_mode: What logprobs are taken from, as ``EngineConfig`` has it.
        num_masks: Masks sent beside the packed vector; 0 if no row has one.
    """

    random: bool = False
    small_top_k: bool = False
    only_small_top_k: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    logprobs: bool = False
    num_logprobs: int = 0
    num_logprob_ids: int = 0
    num_history: int = 0
    num_biases: int = 0
    num_bad_words: int = 0
    num_allowed: int = 0
    logprobs_mode: str = RAW_LOGPROBS
    num_masks: int = 0

    @property
    def truncation(self) -> bool:
        """Whether some row cuts the distribution."""
        return self.small_top_k or self.top_k or self.top_p or self.min_p

    @property
    def edits(self) -> bool:
        """Whether some row changes its logits."""
        lists = self.num_history + self.num_biases + self.num_bad_words + self.num_allowed
        return bool(lists + self.num_masks)


GREEDY = SamplerVariant()


class SamplingRows(NamedTuple):
    """The sampler's inputs of one step, B rows; None where the variant has no use for it.

    Lists have their own lengths: P history entries, E biases, W bad words, A allowed tokens.
    """

    slot: Any  # [B] int32 index into last_tokens
    samples_token: Any  # [B] int32: 0 if the row's token must not be stored
    has_pending: Any = None  # [B] int32: 1 if last_tokens[slot] is not in the history yet
    temperature: Any = None  # [B] float32; 0 is greedy
    position: Any = None  # [B] int32 index in its sequence of the token to be sampled
    seed_high: Any = None  # [B] int32, bits of the seed's upper word
    seed_low: Any = None  # [B] int32, bits of its lower word
    top_k: Any = None  # [B] int32; 0 keeps all
    top_p: Any = None  # [B] float32
    min_p: Any = None  # [B] float32
    repetition: Any = None  # [B] float32
    frequency: Any = None  # [B] float32
    presence: Any = None  # [B] float32
    history_rows: Any = None  # [P] int32
    history_tokens: Any = None  # [P] int32
    history_values: Any = None  # [P] int32: 1 for an output token, PROMPT_TOKEN for the prompt
    bias_rows: Any = None  # [E] int32
    bias_tokens: Any = None  # [E] int32
    bias_values: Any = None  # [E] float32 to add; -inf bans the token
    bad_rows: Any = None  # [W] int32
    bad_previous: Any = None  # [W] int32 pending token that completes the prefix; -1: complete
    bad_tokens: Any = None  # [W] int32 token to ban
    has_allowed: Any = None  # [B] int32: 1 if only the allowed tokens may be sampled
    allowed_rows: Any = None  # [A] int32
    allowed_tokens: Any = None  # [A] int32
    logprob_token_ids: Any = None  # [B, num_logprob_ids] int32
    mask_index: Any = None  # [B] int32: which of the masks is the row's; num_masks for none


@dataclass(frozen=True)
class PackedLayout:
    """Where each field of ``SamplingRows`` lies in the packed vector. Hashable, static.

    Attributes:
        fields: (name, offset, shape) of each field that is present.
        size: Length of the vector.
    """

    fields: tuple[tuple[str, int, tuple[int, ...]], ...]
    size: int

    @classmethod
    def of(cls, variant: SamplerVariant, num_rows: int) -> "PackedLayout":
        """Lay out the fields that a variant needs.

        Args:
            variant: Static description of the batch.
            num_rows: Padded number of rows, B.
        """
        fields, offset = [], 0
        for name, shape in _shapes(variant, num_rows).items():
            fields.append((name, offset, shape))
            offset += math.prod(shape)
        return cls(tuple(fields), offset)

    def views(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """Return writable views of the fields, with their own dtypes."""
        views = {}
        for name, offset, shape in self.fields:
            view = packed[offset : offset + math.prod(shape)].reshape(shape)
            views[name] = view.view(np.float32) if name in FLOAT_FIELDS else view
        return views


def _shapes(variant: SamplerVariant, num_rows: int) -> dict[str, tuple[int, ...]]:
    names = ["slot", "samples_token"]
    if variant.random:
        names += ["temperature", "position", "seed_high", "seed_low"]
        names += ["top_k"] * (variant.top_k or variant.small_top_k)
        names += [name for name in ("top_p", "min_p") if getattr(variant, name)]
    if variant.num_history:
        names += ["repetition", "frequency", "presence"]
    if variant.num_history or variant.num_bad_words:
        names.append("has_pending")
    if variant.num_allowed:
        names.append("has_allowed")
    if variant.num_masks:
        names.append("mask_index")
    shapes: dict[str, tuple[int, ...]] = {name: (num_rows,) for name in names}
    for group, fields in LIST_FIELDS.items():
        size = getattr(variant, f"num_{group}")
        shapes |= {name: (size,) for name in fields if size}
    if variant.num_logprob_ids:
        shapes["logprob_token_ids"] = (num_rows, variant.num_logprob_ids)
    return shapes


class SamplingState:
    """Sampling parameters of the running requests, one numpy entry per slot.

    Host state only. Call ``set_slot`` when a request gets its slot, ``build_rows`` each step.

    Args:
        max_num_seqs: Number of slots.
        vocab_size: Size of the vocabulary; a larger ``top_k`` means all.
        logprobs_mode: What logprobs are taken from, as ``EngineConfig`` has it.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, logprobs_mode: str = RAW_LOGPROBS
    ) -> None:
        self._logprobs_mode = logprobs_mode
        self._max_num_seqs = max_num_seqs
        self._vocab_size = vocab_size
        self._values = {name: np.zeros(max_num_seqs, np.float32) for name in SLOT_FLOATS}
        self._values |= {name: np.zeros(max_num_seqs, np.int32) for name in SLOT_INTS}
        self._num_logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int32)
        self._is_plain = np.zeros(max_num_seqs, bool)  # wants the likeliest token, nothing else
        self._is_masked = np.zeros(max_num_seqs, bool)  # has a constraint
        self._extras: dict[int, SlotExtras] = {}

    def set_slot(
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        prompt_token_ids: Sequence[int] = (),
        end_token_ids: frozenset[int] = frozenset(),
        is_masked: bool = False,
    ) -> None:
        """Take over the parameters of a request that was given a slot.

        Args:
            slot: The request's slot; what was there before is forgotten.
            params: Its sampling parameters.
            seed: Its seed, a 64-bit integer, chosen by the engine if ``params.seed`` is
                None. A preempted request must come back with the same.
            prompt_token_ids: Its prompt, for the repetition penalty.
            end_token_ids: Tokens that would end it, masked before ``min_tokens``.
            is_masked: Whether a mask comes with each of its tokens.
        """
        values = self._values
        values["temperature"][slot] = params.temperature
        values["top_k"][slot] = params.top_k if params.top_k < self._vocab_size else 0
        values["top_p"][slot] = params.top_p
        values["min_p"][slot] = params.min_p
        values["repetition"][slot] = params.repetition_penalty
        values["frequency"][slot] = params.frequency_penalty
        values["presence"][slot] = params.presence_penalty
        values["seed_high"].view(np.uint32)[slot] = (seed >> 32) & 0xFFFFFFFF
        values["seed_low"].view(np.uint32)[slot] = seed & 0xFFFFFFFF
        wanted = params.num_logprobs
        self._num_logprobs[slot] = NO_LOGPROBS if wanted is None else wanted
        self._extras.pop(slot, None)
        has_extras = needs_extras(params)
        is_plain = params.temperature == 0 and wanted is None and not has_extras
        self._is_plain[slot] = is_plain and not is_masked
        self._is_masked[slot] = is_masked
        if has_extras:
            self._extras[slot] = SlotExtras(params, prompt_token_ids, end_token_ids)

    def build_rows(
        self, rows: Sequence[RowLike], num_rows: int
    ) -> tuple[SamplerVariant, PackedLayout, np.ndarray]:
        """Pack the sampler's inputs of one step.

        Args:
            rows: The scheduled rows, whose requests have their slots.
            num_rows: Padded number of rows, B, at least ``len(rows)``.

        Returns:
            The variant to compile for, its layout, and the packed int32 vector.
        """
        n = len(rows)
        slots = np.array([row.request.slot for row in rows], np.int32)
        samples = np.array([row.samples_token for row in rows], np.int32)
        entries, extras = self._collect(rows) if self._extras else ({}, {})
        sampling = slots[samples != 0]
        is_plain = self._is_plain[sampling].all()  # most batches: found out with one look
        variant = GREEDY if is_plain else self._variant(sampling, entries, extras)
        has_mask = np.zeros(n, bool) if is_plain else self._is_masked[slots] & (samples != 0)
        if has_mask.any():
            variant = replace(variant, num_masks=_num_masks(int(has_mask.sum()), num_rows))
        layout = PackedLayout.of(variant, num_rows)
        packed = np.zeros(layout.size, np.int32)
        views = layout.views(packed)
        views["slot"][:n] = slots
        views["slot"][n:] = self._max_num_seqs
        views["samples_token"][:n] = samples
        for name in views.keys() & self._values.keys():
            views[name][:n] = self._values[name][slots]
        if variant.random:
            views["position"][:n] = [_position(row) for row in rows]
        if variant.num_masks:
            views["mask_index"][:] = variant.num_masks
            views["mask_index"][:n][has_mask] = np.arange(has_mask.sum())
        _fill_lists(views, entries, num_rows)
        _fill_extras(views, rows, extras)
        return variant, layout, packed

    def _collect(self, rows: Sequence[RowLike]) -> tuple[Entries, dict[int, SlotExtras]]:
        entries: Entries = {}
        extras = {}
        for index, row in enumerate(rows):
            slot_extras = self._extras.get(row.request.slot)
            if slot_extras is not None and row.samples_token:
                extras[index] = slot_extras
                slot_extras.add_entries(entries, index, row.request, _position(row))
        return entries, extras

    def _variant(
        self, slots: np.ndarray, entries: Entries, extras: dict[int, SlotExtras]
    ) -> SamplerVariant:
        values, wanted = self._values, self._num_logprobs[slots]
        slots_random = slots[values["temperature"][slots] > 0]
        top_k = values["top_k"][slots_random]
        is_small = (top_k > 0) & (top_k <= MAX_SMALL_TOP_K)
        sizes = {
            f"num_{group}": _bucket(max(1, sum(a.shape[1] for a in arrays)), LIST_BUCKETS)
            for group, arrays in entries.items()
        }
        wants_logprobs = bool((wanted != NO_LOGPROBS).any())
        num_ids = max((len(extra.logprob_token_ids) for extra in extras.values()), default=0)
        return SamplerVariant(
            random=slots_random.size > 0,
            small_top_k=bool(is_small.any()),
            only_small_top_k=slots_random.size > 0 and bool(is_small.all()),
            top_k=bool((top_k > MAX_SMALL_TOP_K).any()),
            top_p=bool((values["top_p"][slots_random] < 1.0).any()),
            min_p=bool(values["min_p"][slots_random].any()),
            logprobs=wants_logprobs,
            logprobs_mode=self._logprobs_mode if wants_logprobs else RAW_LOGPROBS,
            num_logprobs=_num_logprobs(wanted, self._vocab_size),
            num_logprob_ids=_bucket(num_ids, LOGPROB_ID_BUCKETS),
            **sizes,
        )


def _position(row: RowLike) -> int:
    return row.num_computed_tokens + row.num_scheduled_tokens


def _fill_lists(views: dict[str, np.ndarray], entries: Entries, num_rows: int) -> None:
    for group, arrays in entries.items():
        columns = np.concatenate(arrays, axis=1)
        for name, column in zip(LIST_FIELDS[group], columns, strict=True):
            view = views[name].view(np.int32)  # floats are copied by their bits
            view[: len(column)] = column
            view[len(column) :] = num_rows if name.endswith("_rows") else 0


def _fill_extras(
    views: dict[str, np.ndarray], rows: Sequence[RowLike], extras: dict[int, SlotExtras]
) -> None:
    for index, extra in extras.items():
        row = rows[index]
        if "has_pending" in views:
            views["has_pending"][index] = _position(row) > len(row.request.all_token_ids)
        if "has_allowed" in views:
            views["has_allowed"][index] = extra.has_allowed
        if "logprob_token_ids" in views:
            ids = extra.logprob_token_ids
            views["logprob_token_ids"][index, : len(ids)] = ids


def _num_masks(num_masked: int, num_rows: int) -> int:
    return min(next((b for b in MASK_BUCKETS if b >= num_masked), num_rows), num_rows)


def _num_logprobs(wanted: np.ndarray, vocab_size: int) -> int:
    if (wanted == -1).any():
        return -1
    largest = int(wanted.max(initial=0))
    return min(_bucket(largest, LOGPROB_BUCKETS), vocab_size)


def _bucket(size: int, buckets: tuple[int, ...]) -> int:
    """Round up to a bucket; beyond the last one the size stays as it is."""
    return next((bucket for bucket in buckets if bucket >= size), size)
