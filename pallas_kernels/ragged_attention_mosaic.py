"""Ragged prefill attention over a paged KV cache in Pallas Mosaic GPU, for Hopper.

A persistent program per SM walks a list of items: one tile of query tokens (ragged_tiles.py) for
one pair of query heads of a KV head, or, where the group is odd, a tile twice as long for one
head. A producer warpgroup copies the query tiles and, block by block through the block table, the
K/V tiles into a ring in shared memory, and runs ahead over the ends of items; as issuing many small
copies takes time, two of its warps share the keys and two the values. Two consumer warpgroups of 64
matrix rows each take turns at the tensor core: while one multiplies, the other computes its
softmax; within a warpgroup, Q @ K of one tile overlaps P @ V of the tile before.
Source: FlashAttention-3, arXiv:2407.08608, Algorithms 1 and 2 and section 3.1.
Limits: bfloat16 or float16; head_dim 64, 128 or 256; a block_size that divides the K/V tile or is
a multiple of it; else NotImplementedError.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.ragged_tiles import build_ragged_tiles, key_tiles
from jaxengine.pallas_kernels.target import Target
from jaxtyping import Array, Float, Int

LOG2_E = math.log2(math.e)
# Starting maximum: finite, so that a row whose keys are all masked gives 0 and not NaN.
LOWEST = -1e30
ROWS = 64  # matrix rows of a warpgroup: the M of wgmma
CONSUMERS = 2
PRODUCER = CONSUMERS  # index of the warpgroup
PRODUCER_PARTS = 2  # warps that share the keys, and as many the values; one for each consumer's Q
ROW_ALIGNMENT = 8  # rows of a swizzled tile in shared memory: TMA copies whole ones
# K/V bytes that programs running at the same time may share: half of the 50 MB of an H100's L2.
SHARED_KV_BYTES = 24 << 20


class RaggedMosaicConfig(NamedTuple):
    """Tile sizes and schedule."""

    tile_kv: int  # keys of one step
    num_stages: int  # K/V tiles in the ring
    take_turns: bool  # order the matrix products of the two consumers
    num_programs: int | None = None  # None: one per SM


class _Problem(NamedTuple):
    """What is fixed at compile time: the shapes and options of one kernel."""

    config: RaggedMosaicConfig
    num_kv_heads: int
    group: int
    heads_per_item: int
    head_dim: int
    block_size: int
    options: AttentionOptions
    has_slopes: bool
    has_sinks: bool
    num_programs: int
    interpret: Any

    @property
    def tile_q(self) -> int:
        """Query tokens of an item."""
        return ROWS * CONSUMERS // self.heads_per_item

    @property
    def out_columns(self) -> int:
        """Columns of the output that are staged in shared memory at a time."""
        return min(self.head_dim, 128) if self.head_dim < 256 else 64


class _Item(NamedTuple):
    """One unit of work; scalars."""

    kv_head: jax.Array
    head: jax.Array  # the first of heads_per_item
    row: jax.Array
    token: jax.Array  # a multiple of ROW_ALIGNMENT
    start: jax.Array
    num_tokens: jax.Array
    position: jax.Array
    first: jax.Array  # key tiles, as in key_tiles
    first_full: jax.Array
    last_full: jax.Array
    last: jax.Array


class _Refs(NamedTuple):
    """Arguments of the kernel body: global memory, then scratch."""

    row: Any
    token: Any
    start: Any
    num_tokens: Any
    position: Any
    schedule: Any  # [2] int32: number of tiles, number of sections
    block_tables: Any
    slopes: Any
    sinks: Any
    q: Any
    k: Any
    v: Any
    out: Any
    q_s: Any  # [CONSUMERS, ROWS, H]
    k_s: Any  # [num_stages, tile_kv, H]
    v_s: Any
    p_s: Any  # [CONSUMERS, ROWS, tile_kv], interpreter only
    out_s: Any  # [CONSUMERS, ROWS, out_columns] tiled for one copy, and untiled for rows one by one
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    turn: Any
    done: Any


def default_config(head_dim: int) -> RaggedMosaicConfig:
    """Return the configuration for Hopper, as measured on an H200 (benchmarks/LOG.md)."""
    if head_dim > 128:
        return RaggedMosaicConfig(tile_kv=64, num_stages=2, take_turns=False)
    return RaggedMosaicConfig(tile_kv=128, num_stages=2, take_turns=head_dim < 128)


def ragged_attention_mosaic(
    q: Float[Array, "T N H"],
    k_cache: Float[Array, "num_blocks K block_size H"],
    v_cache: Float[Array, "num_blocks K block_size H"],
    block_tables: Int[Array, "B W"],
    seq_lens: Int[Array, " B"],
    query_start_loc: Int[Array, " B+1"],
    num_decode_rows: Int[Array, ""],
    alibi_slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    *,
    options: AttentionOptions,
    target: Target,
    config: RaggedMosaicConfig | None = None,
    interpret: Any = None,
) -> Float[Array, "T N H"]:
    """Attend causally from the query tokens of every row from ``num_decode_rows`` on.

    The last query token of a row sits at position ``seq_len - 1`` and the caches already hold this
    step's keys and values, so chunked prefill and a cached prefix are the same case.

    Args:
        q: Query tokens of all rows, packed.
        k_cache: Keys of one layer.
        v_cache: Values of one layer. Unwritten slots must be finite.
        block_tables: Block ids of each row; unused entries hold any valid id.
        seq_lens: KV length of each row, this step's tokens included; 0 for a padding row.
        query_start_loc: First packed token of each row, and the number of tokens at the end.
        num_decode_rows: The first rows, left to the decode kernel.
        alibi_slopes: ``slope[n] * (key position - query position)`` is added to the scores.
        sinks: Of each query head, a score that takes its share of the softmax and has no value.
        options: Scale, window and soft cap.
        target: The GPU.
        config: Tile sizes and schedule, None for the default of the head_dim.
        interpret: ``plgpu.InterpretGPUParams`` to run on the CPU, slowly, for tests.

    Returns:
        The attention output. Tokens of decode rows and padding tokens hold zeros.

    Raises:
        NotImplementedError: For a dtype, shape or jax version that this kernel does not serve.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    config = config or default_config(head_dim)
    _check_supported(q, k_cache, v_cache, config)
    padding = -q.shape[0] % ROW_ALIGNMENT
    q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
    group = num_heads // num_kv_heads
    heads_per_item = CONSUMERS if group % CONSUMERS == 0 else 1
    tiles = build_ragged_tiles(
        query_start_loc,
        seq_lens,
        num_decode_rows,
        num_tokens=q.shape[0],
        tile_q=ROWS * CONSUMERS // heads_per_item,
        alignment=ROW_ALIGNMENT,
    )
    max_items = tiles.row.shape[0] * (num_heads // heads_per_item)
    problem = _Problem(
        config=config,
        num_kv_heads=num_kv_heads,
        group=group,
        heads_per_item=heads_per_item,
        head_dim=head_dim,
        block_size=block_size,
        options=options,
        has_slopes=alibi_slopes is not None,
        has_sinks=sinks is not None,
        num_programs=min(config.num_programs or target.num_sms, max_items),
        interpret=interpret,
    )
    num_sections = _num_sections(problem, seq_lens, num_decode_rows, q.dtype.itemsize)
    schedule = jnp.concatenate([tiles.num_tiles, num_sections[None]])
    per_head = [a.astype(jnp.float32) for a in (alibi_slopes, sinks) if a is not None]
    out = _call(problem, *tiles[:5], schedule, block_tables, *per_head, q, k_cache, v_cache)
    return out[: q.shape[0] - padding]


@functools.partial(jax.jit, static_argnums=0)
def _call(problem: _Problem, *operands: jax.Array) -> jax.Array:
    """Run the kernel. Jitted so that jax lowers it once for all layers.

    Each lowering numbers its kernel, and kernels that differ in number are compiled again.
    """
    q = operands[-3]
    kernel = plgpu.kernel(
        functools.partial(_body, problem),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_scratch_types(problem, q.dtype),
        grid=(problem.num_programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="ragged_attention_mosaic",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **({"interpret": problem.interpret} if problem.interpret else {}),
    )
    return kernel(*operands)


def _check_supported(
    q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, config: RaggedMosaicConfig
) -> None:
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"ragged Mosaic attention: jax {jax.__version__} is too old")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"ragged Mosaic attention: dtype {q.dtype}, not bf16 or fp16")
    if k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        raise NotImplementedError(
            f"ragged Mosaic attention: cache is {k_cache.dtype}/{v_cache.dtype}, query {q.dtype}"
        )
    if q.shape[-1] not in (64, 128, 256):
        raise NotImplementedError(f"ragged Mosaic attention: head_dim {q.shape[-1]}")
    block_size = k_cache.shape[2]
    if (config.tile_kv % block_size and block_size % config.tile_kv) or block_size % 8:
        raise NotImplementedError(f"ragged Mosaic attention: block_size {block_size}")
    if q.shape[1] % k_cache.shape[1]:
        raise NotImplementedError(
            f"ragged Mosaic attention: {q.shape[1]} query heads, {k_cache.shape[1]} KV heads"
        )


def _num_sections(
    problem: _Problem, seq_lens: jax.Array, num_decode_rows: jax.Array, itemsize: int
) -> jax.Array:
    """Return in how many parts to take the KV heads, so that what runs together fits in L2."""
    is_ours = jnp.arange(seq_lens.shape[0]) >= num_decode_rows
    num_keys = jnp.sum(jnp.where(is_ours, seq_lens, 0))
    token_bytes = 2 * problem.num_kv_heads * problem.head_dim * itemsize
    wanted = num_keys * (token_bytes / SHARED_KV_BYTES)
    divisors = [d for d in range(1, problem.num_kv_heads + 1) if problem.num_kv_heads % d == 0]
    fitting = [jnp.where(wanted <= d, d, problem.num_kv_heads) for d in divisors]
    return functools.reduce(jnp.minimum, fitting).astype(jnp.int32)


def _scratch_types(problem: _Problem, dtype: Any) -> list[Any]:
    config, head_dim = problem.config, problem.head_dim
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    kv_shape = (config.num_stages, config.tile_kv, head_dim)
    out_shape = (CONSUMERS, ROWS, problem.out_columns)
    copies = max(1, config.tile_kv // problem.block_size)
    kv_full = plgpu.Barrier(num_arrivals=copies, num_barriers=config.num_stages)
    kv_free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.num_stages)
    p_shape = (CONSUMERS, ROWS, config.tile_kv)
    return [
        plgpu.SMEM((CONSUMERS, ROWS, head_dim), dtype, transforms=tiled),
        plgpu.SMEM(kv_shape, dtype, transforms=tiled),
        plgpu.SMEM(kv_shape, dtype, transforms=tiled),
        plgpu.SMEM(p_shape, dtype, transforms=tiled) if problem.interpret else None,
        plgpu.RefUnion(
            plgpu.SMEM(out_shape, dtype, transforms=tiled), plgpu.SMEM(out_shape, dtype)
        ),
        plgpu.Barrier(num_barriers=CONSUMERS),
        plgpu.Barrier(num_barriers=CONSUMERS),
        kv_full,
        kv_free,
        kv_full,
        kv_free,
        plgpu.Barrier(num_barriers=CONSUMERS),
        plgpu.Barrier(num_arrivals=CONSUMERS + 1),
    ]


def _body(problem: _Problem, *refs: Any) -> None:
    arguments = list(refs)
    if not problem.has_slopes:
        arguments.insert(7, None)
    if not problem.has_sinks:
        arguments.insert(8, None)
    kernel = _Refs(*arguments)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        _produce(problem, kernel)

    @pl.when(warpgroup != PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        _consume(problem, kernel, warpgroup)

    # No warpgroup may leave while another still multiplies: the GPU calls it illegal.
    plgpu.barrier_arrive(kernel.done)
    plgpu.barrier_wait(kernel.done)


def _for_each_item(problem: _Problem, refs: _Refs, visit: Any, carry: Any) -> Any:
    """Call ``visit(round, item, carry)`` for the items of this program.

    Programs take items in rounds, every other round in the opposite order: costs fall or rise
    steadily along the list, so that each program gets about the same sum.
    """
    program = lax.axis_index("program")
    num_tiles = refs.schedule[0]
    groups = problem.num_kv_heads * (problem.group // problem.heads_per_item)
    num_items = num_tiles * groups
    num_rounds = lax.div(num_items + (problem.num_programs - 1), jnp.int32(problem.num_programs))

    def one_round(i: jax.Array, carry: Any) -> Any:
        step = jnp.where(lax.rem(i, 2) == 0, program, problem.num_programs - 1 - program)
        index = i * problem.num_programs + step
        return lax.cond(
            index < num_items,
            lambda carry: visit(i, _item(problem, refs, index), carry),
            lambda carry: carry,
            carry,
        )

    return lax.fori_loop(0, num_rounds, one_round, carry)


def _item(problem: _Problem, refs: _Refs, index: jax.Array) -> _Item:
    """Read item ``index``: sections of KV heads, in them tiles, in them the heads of the section.

    Tiles come lightest first and heaviest first in turns, the last section heaviest first: costs
    then never jump, and the items that are started last are short.
    """
    num_tiles, num_sections = refs.schedule[0], refs.schedule[1]
    items_per_kv_head = problem.group // problem.heads_per_item
    section_heads = lax.div(jnp.int32(problem.num_kv_heads), num_sections) * items_per_kv_head
    section = lax.div(index, num_tiles * section_heads)
    index = lax.rem(index, num_tiles * section_heads)
    tile, head_index = lax.div(index, section_heads), lax.rem(index, section_heads)
    head_index += section * section_heads
    tile = jnp.where(lax.rem(num_sections - section, 2) == 1, tile, num_tiles - 1 - tile)
    position, num_tokens = refs.position[tile], refs.num_tokens[tile]
    first, first_full, last_full, last = key_tiles(
        position, num_tokens, problem.config.tile_kv, problem.options.sliding_window
    )
    return _Item(
        kv_head=lax.div(head_index, jnp.int32(items_per_kv_head)),
        head=head_index * problem.heads_per_item,
        row=refs.row[tile],
        # Said so that it can be proved at compile time.
        token=lax.div(refs.token[tile], jnp.int32(ROW_ALIGNMENT)) * ROW_ALIGNMENT,
        start=refs.start[tile],
        num_tokens=num_tokens,
        position=position,
        first=first,
        first_full=first_full,
        last_full=last_full,
        # A tile without keys (filler) reads one, all masked, and stores zeros.
        last=jnp.maximum(last, first + 1),
    )


def _query_slice(problem: _Problem, item: _Item, warpgroup: Any) -> tuple[jax.Array, jax.Array]:
    """Return the first token and the head of a consumer's rows."""
    if problem.heads_per_item == 1:
        return item.token + warpgroup * ROWS, item.head
    return item.token, item.head + warpgroup


def _produce(problem: _Problem, refs: _Refs) -> None:
    def start_warp(warp: jax.Array) -> None:
        for is_key in (True, False):
            for part in range(PRODUCER_PARTS):

                @pl.when(warp == (0 if is_key else PRODUCER_PARTS) + part)
                def _(is_key: bool = is_key, part: int = part) -> None:
                    _produce_part(problem, refs, is_key=is_key, part=part)

    plgpu.warp_map(start_warp)


def _produce_part(problem: _Problem, refs: _Refs, *, is_key: bool, part: int) -> None:
    """Copy every PRODUCER_PARTS-th block of the K or V tiles; with keys, a consumer's queries."""
    config = problem.config
    source, ring_s, full, free = (
        (refs.k, refs.k_s, refs.k_full, refs.k_free)
        if is_key
        else (refs.v, refs.v_s, refs.v_full, refs.v_free)
    )
    parts = range(part, max(1, config.tile_kv // problem.block_size), PRODUCER_PARTS)

    def load_queries(i: jax.Array, item: _Item) -> None:
        token, head = _query_slice(problem, item, part)

        @pl.when(i > 0)
        def _() -> None:
            plgpu.barrier_wait(refs.q_free.at[part])

        plgpu.copy_gmem_to_smem(
            refs.q.at[pl.ds(token, ROWS), head], refs.q_s.at[part], refs.q_full.at[part]
        )

    def visit(i: jax.Array, item: _Item, position_in_ring: jax.Array) -> jax.Array:
        if is_key:
            load_queries(i, item)
        # The last tile may overhang the row: its table entries are read no further.
        last_key = jnp.maximum(item.position + item.num_tokens - 1, 0)
        last_block = lax.div(last_key, jnp.int32(problem.block_size))

        def block_ids_of(tile: jax.Array) -> tuple[jax.Array, ...]:
            first_block = lax.div(tile * config.tile_kv, jnp.int32(problem.block_size))
            return tuple(
                refs.block_tables[item.row, jnp.clip(first_block + b, 0, last_block)] for b in parts
            )

        def load_tile(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            ring, *block_ids = carry
            tile = item.last - 1 - j
            slot = lax.rem(ring, jnp.int32(config.num_stages))
            # Those of the next tile, so that their way from memory passes beside this one's copies.
            next_ids = block_ids_of(tile - 1)

            @pl.when(ring >= config.num_stages)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

            for b, block_id in zip(parts, block_ids, strict=True):
                if problem.block_size > config.tile_kv:
                    offset = lax.rem(tile * config.tile_kv, jnp.int32(problem.block_size))
                    block = source.at[block_id, item.kv_head, pl.ds(offset, config.tile_kv)]
                    plgpu.copy_gmem_to_smem(block, ring_s.at[slot], full.at[slot])
                else:
                    rows = pl.ds(b * problem.block_size, problem.block_size)
                    block = source.at[block_id, item.kv_head]
                    plgpu.copy_gmem_to_smem(block, ring_s.at[slot, rows], full.at[slot])
            return ring + 1, *next_ids

        start = position_in_ring, *block_ids_of(item.last - 1)
        ring, *_ = lax.fori_loop(0, item.last - item.first, load_tile, start)
        return ring

    num_loaded = _for_each_item(problem, refs, visit, jnp.int32(0))

    # Every completion of a barrier has to be awaited before the program ends.
    if is_key:

        @pl.when(num_loaded > 0)
        def _() -> None:
            plgpu.barrier_wait(refs.q_free.at[part])

    def drain(ring: jax.Array, _: None) -> None:
        plgpu.barrier_wait(free.at[lax.rem(ring, jnp.int32(config.num_stages))])

    lax.fori_loop(jnp.maximum(num_loaded - config.num_stages, 0), num_loaded, drain, None)


def _consume(problem: _Problem, refs: _Refs, warpgroup: jax.Array) -> None:
    config, options = problem.config, problem.options
    shape = (ROWS, config.tile_kv)
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    column_layout = plgpu.Layout.WGMMA.reduce(0)
    other = 1 - warpgroup

    def wait_for_turn() -> None:
        if config.take_turns:
            plgpu.barrier_wait(refs.turn.at[warpgroup])

    def pass_turn() -> None:
        if config.take_turns:
            plgpu.barrier_arrive(refs.turn.at[other])

    def start_values(acc_ref: Any, acc: jax.Array, p: jax.Array) -> Any:
        """Put ``acc`` into ``acc_ref`` and return p as the left operand of p @ V."""
        if problem.interpret:  # the interpreter multiplies from shared memory only
            refs.p_s.at[warpgroup][...] = p
            plgpu.commit_smem()
            return refs.p_s.at[warpgroup]
        acc_ref[...] = acc
        return lax.optimization_barrier(p)

    def started(acc_ref: Any, acc: jax.Array) -> jax.Array:
        """Return the value that ``acc_ref`` will have; not to be touched before a wait."""
        result = plgpu.wgmma_accumulator_load(acc_ref, wait_n=None)
        return acc + result if problem.interpret else result

    def visit(i: jax.Array, item: _Item, ring: jax.Array) -> jax.Array:
        del i
        token, head = _query_slice(problem, item, warpgroup)
        query_position = item.position + (token - item.token)
        slope = refs.slopes[head] * LOG2_E if problem.has_slopes else None

        def softmax(
            dots: jax.Array, tile: jax.Array, maximum: jax.Array, total: jax.Array, masked: bool
        ) -> tuple[jax.Array, ...]:
            """Return p, the decay of what was summed before, the new maximum and total."""
            first_key = tile * config.tile_kv
            scores, factor = dots, options.scale * LOG2_E
            if options.logits_soft_cap is not None:
                scores = soft_capped(scores, options.scale, options.logits_soft_cap)
                factor = 1.0
            if masked or slope is not None:
                column = plgpu.broadcasted_iota(
                    jnp.int32, (config.tile_kv,), 0, layout=column_layout
                )
            if slope is not None:
                # Relative to one position for all rows: a row's softmax ignores what it adds.
                bias = (column + (first_key - query_position)).astype(jnp.float32) * slope
                scores = scores * factor + lax.broadcast_in_dim(bias, shape, (1,))
                factor = 1.0
            if masked:
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout)
                newest = lax.broadcast_in_dim(row + (query_position - first_key), shape, (0,))
                columns = lax.broadcast_in_dim(column, shape, (1,))
                visible = columns <= newest
                if options.sliding_window is not None:
                    visible &= columns > newest - options.sliding_window
                scores = jnp.where(visible, scores, -jnp.inf)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1) * factor)
            decay = jnp.exp2(maximum - new_maximum)
            p = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_maximum, shape, (0,)))
            total = total * decay + p.sum(axis=1)
            return p, decay, new_maximum, total

        def rescale(acc: jax.Array, factor: jax.Array) -> jax.Array:
            return acc * lax.broadcast_in_dim(factor, acc.shape, (0,))

        def slot_of(step: jax.Array) -> jax.Array:
            return lax.rem(ring + step, jnp.int32(config.num_stages))

        def finish_values(step: jax.Array, acc: jax.Array) -> jax.Array:
            """Wait for the p @ V started in ``step`` and free its V tile."""
            plgpu.wgmma_wait(0)

            @pl.when(step > 0)  # step 0 starts none
            def _() -> None:
                plgpu.barrier_arrive(refs.v_free.at[slot_of(step - 1)])

            return lax.optimization_barrier(acc)

        def first_step() -> tuple[jax.Array, ...]:
            """Q @ K of the last key tile, on the diagonal."""
            slot = slot_of(jnp.int32(0))
            plgpu.barrier_wait(refs.q_full.at[warpgroup])
            plgpu.barrier_wait(refs.k_full.at[slot])

            def multiply(dots_ref: Any) -> jax.Array:
                k = refs.k_s.at[slot].transpose((1, 0))
                plgpu.wgmma(dots_ref, refs.q_s.at[warpgroup], k)
                return dots_ref[...]

            dots = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
            dots = lax.optimization_barrier(dots)
            plgpu.barrier_arrive(refs.k_free.at[slot])
            lowest, nothing = LOWEST, 0.0
            if problem.has_sinks:  # as a key without a value
                lowest, nothing = refs.sinks[head] * LOG2_E, 1.0
            maximum = plgpu.layout_cast(jnp.full((ROWS,), lowest, jnp.float32), row_layout)
            if problem.has_sinks and slope is not None:  # what slopes add to a row, see softmax
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout)
                maximum = maximum + row.astype(jnp.float32) * slope
            total = plgpu.layout_cast(jnp.full((ROWS,), nothing, jnp.float32), row_layout)
            acc = plgpu.layout_cast(
                jnp.zeros((ROWS, problem.head_dim), jnp.float32), plgpu.Layout.WGMMA
            )
            return acc, *softmax(dots, item.last - 1, maximum, total, masked=True)

        def step(j: jax.Array, carry: tuple[jax.Array, ...], *, masked: bool) -> Any:
            """Start p @ V of the tile before and Q @ K of this one; softmax of the latter.

            The product with V is awaited in the next step only. That wait must stand behind a
            branch, which the wait for K is: within a block of code ptxas would move it up, before
            the softmax that it is to run under. And p is rounded after the wait, as the registers
            of the last p are an operand until then.
            """
            acc, p, decay, maximum, total = carry
            k_slot, v_slot = slot_of(j), slot_of(j - 1)
            plgpu.barrier_wait(refs.k_full.at[k_slot])
            acc = rescale(finish_values(j - 1, acc), decay)
            p = lax.optimization_barrier(p).astype(refs.q.dtype)
            plgpu.barrier_wait(refs.v_full.at[v_slot])
            wait_for_turn()

            def multiply(dots_ref: Any, acc_ref: Any) -> tuple[jax.Array, jax.Array]:
                left = start_values(acc_ref, acc, p)
                k = refs.k_s.at[k_slot].transpose((1, 0))
                plgpu.wgmma(dots_ref, refs.q_s.at[warpgroup], k)
                plgpu.wgmma(acc_ref, left, refs.v_s.at[v_slot])
                pass_turn()
                dots = plgpu.wgmma_accumulator_load(dots_ref, wait_n=1)
                return lax.optimization_barrier(dots), started(acc_ref, acc)

            dots, acc = pl.run_scoped(
                multiply,
                plgpu.ACC(shape, jnp.float32),
                plgpu.ACC((ROWS, problem.head_dim), jnp.float32),
            )
            plgpu.barrier_arrive(refs.k_free.at[k_slot])
            return acc, *softmax(dots, item.last - 1 - j, maximum, total, masked=masked)

        num_steps = item.last - item.first
        carry = first_step()
        masked_step = functools.partial(step, masked=True)
        # Counted from the last key tile down: diagonal, full tiles, edge of the window.
        full_from = jnp.maximum(item.last - item.last_full, 1)
        full_to = jnp.maximum(item.last - item.first_full, full_from)
        carry = lax.fori_loop(1, jnp.minimum(full_from, num_steps), masked_step, carry)
        carry = lax.fori_loop(full_from, full_to, functools.partial(step, masked=False), carry)
        if options.sliding_window is not None:
            carry = lax.fori_loop(full_to, num_steps, masked_step, carry)
        acc, p, decay, _, total = carry
        plgpu.barrier_arrive(refs.q_free.at[warpgroup])
        acc = rescale(finish_values(num_steps - 1, acc), decay)
        p = lax.optimization_barrier(p).astype(refs.q.dtype)
        slot = slot_of(num_steps - 1)
        plgpu.barrier_wait(refs.v_full.at[slot])

        def multiply_last(acc_ref: Any) -> jax.Array:
            left = start_values(acc_ref, acc, p)
            plgpu.wgmma(acc_ref, left, refs.v_s.at[slot])
            return started(acc_ref, acc)

        acc = pl.run_scoped(multiply_last, plgpu.ACC((ROWS, problem.head_dim), jnp.float32))
        acc = finish_values(num_steps, acc)
        out = rescale(acc, 1.0 / jnp.maximum(total, 1e-30)).astype(refs.out.dtype)
        first_row = item.start - (token - item.token)
        last_row = jnp.minimum(item.num_tokens - (token - item.token), ROWS)
        _store(problem, refs, warpgroup, out, token, head, jnp.maximum(first_row, 0), last_row)
        return ring + num_steps

    if config.take_turns:  # the first turn is warpgroup 0's

        @pl.when(warpgroup == 1)
        def _() -> None:
            pass_turn()

    _for_each_item(problem, refs, visit, jnp.int32(0))
    if config.take_turns:

        @pl.when(warpgroup == 0)
        def _() -> None:
            wait_for_turn()

    plgpu.wait_smem_to_gmem(0)


def _store(
    problem: _Problem,
    refs: _Refs,
    warpgroup: jax.Array,
    out: jax.Array,
    token: jax.Array,
    head: jax.Array,
    first_row: jax.Array,
    last_row: jax.Array,
) -> None:
    """Write the rows of ``out`` [ROWS, H] from ``first_row`` to before ``last_row``, no others."""
    tiled, untiled = refs.out_s
    width = problem.out_columns
    for first in range(0, problem.head_dim, width):
        columns = pl.ds(first, width)
        part = out[:, first : first + width]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copies of the part before

        is_whole = (first_row == 0) & (last_row == ROWS)

        @pl.when(is_whole)
        def _(part: jax.Array = part, columns: Any = columns) -> None:
            tiled.at[warpgroup][...] = part
            plgpu.commit_smem()
            target = refs.out.at[pl.ds(token, ROWS), head, columns]
            plgpu.copy_smem_to_gmem(tiled.at[warpgroup], target)

        @pl.when(~is_whole)
        def _(part: jax.Array = part, columns: Any = columns) -> None:
            untiled.at[warpgroup][...] = part
            plgpu.commit_smem()

            def store_row(i: jax.Array, _: None) -> None:
                target = refs.out.at[pl.ds(token + i, 1), head, columns]
                plgpu.copy_smem_to_gmem(untiled.at[warpgroup, pl.ds(i, 1)], target)

            lax.fori_loop(first_row, last_row, store_row, None)


def soft_capped(dots: jax.Array, scale: float, cap: float) -> jax.Array:
    """Return ``cap * tanh(scale * dots / cap)`` in units whose exponential is ``exp2``."""
    # tanh(x) = 1 - 2 / (1 + e^2x): exact at both ends, and cheaper than the library's.
    exponential = jnp.exp2(dots * (2 * scale / cap * LOG2_E))
    return (cap * LOG2_E) * (1 - 2 / (1 + exponential))
