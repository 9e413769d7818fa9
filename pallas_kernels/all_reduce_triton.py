"""Sum and gathering of an array over the GPUs of a process, each writing into its peers' memory.

A tensor-parallel decode step adds up a few kilobytes twice a layer: what counts is latency. XLA's
own sum is a launch outside of the step's CUDA graph, on another stream; these are ordinary kernels,
so that the step stays one graph. Each GPU keeps an inbox, whose address all others know. JAX has no
word for another device's memory, hence the inline PTX.

Small arrays, grid (tiles,): a thread sends four numbers as two 8-byte packets, each with the
number of the call in it, to every GPU, then waits for the packets of all, and adds them up in the
order of the GPUs, so that all have the same sum, or keeps them side by side. One trip over the
wire, no barrier.
Source: the LL protocol of NCCL (described in arXiv:2507.04786).

Large arrays between two GPUs, grid (programs,), all of them resident: a program sends tile after
tile into a ring of its own at the peer, each followed by a flag, and takes in the peer's tiles
``DEPTH`` behind. It has received tile i only if the peer has sent it, and so has taken in tile
i - DEPTH of this side: 2 DEPTH places suffice, and none has to be reported free.

Inboxes exist twice, for calls of even and odd number. A GPU that finishes call c has met data of
call c from every peer, which had finished c - 1 by then: so no call c + 1 writes where one c - 1
still reads. That holds for calls that run one after the other, each with the result of the one
before; see ``Peers``. A wait that lasts a minute ends the program with a CUDA error.

The residual stream and its norm, which follow a sum in a model, can be had in the same kernel: for
that a small array's program has a whole row, and a large one's tiles are whole rows.
Limits: 16-bit floats; for large arrays two GPUs, with a norm also rows that divide a tile; else
NotImplementedError.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.peers import DEPTH, LARGE_TILE, RING, SMALL_TILE, InboxLayout, Peers
from jaxengine.pallas_kernels.residual_norm_triton import (
    NormKind,
    RowProblem,
    add_row,
    add_up,
    check_row_operands,
    normalised,
    row_arrays,
)
from jaxtyping import Array, Float, Int

PACKED = 4  # numbers of a thread in a small array: two packets of 8 bytes, half of it data
VECTOR = 8  # numbers of one 16-byte store in a large one
MAX_WARPS = 32  # of a program
MAX_ROW = 8192  # numbers of a program that has a whole row: two packets a thread
POLLS = 1 << 27  # about half a microsecond each


def all_reduce_triton(
    x: Float[Array, "T D"],
    peers: Peers,
    residual: Float[Array, "T D"] | None = None,
) -> Float[Array, "T D"]:
    """Return the sum over all GPUs, the same bits on each, and the residual added to it.

    Args:
        x: This GPU's part.
        peers: Where to write, and the number of the call.
        residual: The same on all GPUs; None for none.

    Raises:
        NotImplementedError: For a dtype or a size not served.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"all-reduce in Triton: {x.dtype}, not of 16 bits")
    layout = peers.layout
    if x.size <= layout.small_elements:
        kernel, vector = _add_small, PACKED
    elif x.size <= layout.large_elements and layout.num_gpus == 2:
        kernel, vector = _add_large, VECTOR
    else:
        raise NotImplementedError(f"all-reduce in Triton: {x.size} numbers, {layout}")
    if x.shape[1] % vector:  # a thread's numbers lie in one row
        raise NotImplementedError(f"all-reduce in Triton: D is {x.shape[1]}, not n * {vector}")
    others = () if residual is None else (residual.astype(x.dtype),)
    return kernel(layout, x, *_where(peers), *others)


def all_reduce_norm_triton(
    addends: Addends,
    peers: Peers,
    residual: Float[Array, "T D"],
    norms: tuple[Norm, ...],
    *,
    inner: Norm | None = None,
    scale: float = 1.0,
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "T D"], ...]]:
    """Return the residual stream with the sum over all GPUs, and its norms, as ``residual_norm``.

    Args:
        addends: This GPU's; added up and rounded to the residual's dtype before they are sent.
        peers: Where to write, and the number of the call.
        residual: The same on all GPUs.
        norms: Of the stream.
        inner: Of the sum before it joins.
        scale: Factor on what joins.

    Raises:
        NotImplementedError: For a dtype or a size not served; of a large array also for anything
            but one product and one plain norm.
    """
    layout, (num_rows, num_columns) = peers.layout, residual.shape
    check_row_operands(addends, residual, norms, inner)
    if num_columns % PACKED:  # a thread's numbers lie in one row, side by side
        raise NotImplementedError(f"all-reduce in Triton: D is {num_columns}, not n * {PACKED}")
    padded = max(PACKED * 32, pl.next_power_of_2(num_columns))
    if num_rows * padded <= layout.small_elements and padded <= MAX_ROW:
        problem = RowProblem.of(addends, norms, inner, scale)
        arrays = row_arrays(addends, residual, norms, inner)
        like = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
        total, *normed = _add_rows(layout, problem, padded, like, *_where(peers), *arrays)
        return total, tuple(normed)
    fits = residual.size <= layout.large_elements and LARGE_TILE % num_columns == 0
    is_plain = addends.is_single and len(norms) == 1 and norms[0].is_plain
    is_plain &= inner is None and scale == 1
    parts = addends.arrays[0]
    if not (fits and is_plain and layout.num_gpus == 2 and parts.shape[0] == 1):
        raise NotImplementedError(f"all-reduce in Triton, with norm: {residual.shape}, {layout}")
    if num_columns < VECTOR:
        raise NotImplementedError(f"all-reduce in Triton, with norm: D is {num_columns}")
    x = parts[0].astype(residual.dtype)
    where = _where(peers)
    total, normed = _add_large_rows(layout, norms[0].eps, x, *where, residual, norms[0].weight)
    return total, (normed,)


def all_gather_triton(x: Int[Array, "T D"], peers: Peers) -> Int[Array, "N T D"]:
    """Return the arrays of all GPUs, in their order.

    Args:
        x: This GPU's, 32-bit integers.
        peers: Where to write, and the number of the call, of which sums are counted too.

    Raises:
        NotImplementedError: For a size not served.
    """
    layout = peers.layout
    halves = lax.bitcast_convert_type(x, jnp.int16).reshape(x.shape[0], -1)
    if halves.shape[1] % PACKED or halves.size > layout.small_elements:
        raise NotImplementedError(f"all-gather in Triton: shape {x.shape}, {layout}")
    parts = _gather_small(layout, halves, *_where(peers))
    return lax.bitcast_convert_type(parts.reshape(layout.num_gpus, *x.shape, 2), jnp.int32)


def _where(peers: Peers) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a kernel is told of its peers, as arrays."""
    return peers.addresses, peers.origin, jnp.asarray(peers.calls_before, jnp.int32).reshape(1)


@functools.partial(jax.jit, static_argnums=0)
def _gather_small(layout: InboxLayout, x: jax.Array, *where: jax.Array) -> jax.Array:
    shape = (layout.num_gpus * x.shape[0], x.shape[1])
    return _call_small(layout, False, shape, "all_gather_small", x, *where)


@functools.partial(jax.jit, static_argnums=0)  # jitted: lowered once for all layers
def _add_small(layout: InboxLayout, x: jax.Array, *where: jax.Array) -> jax.Array:
    return _call_small(layout, True, x.shape, "all_reduce_small", x, *where)


def _call_small(
    layout: InboxLayout,
    is_sum: bool,
    out_shape: tuple[int, ...],
    name: str,
    x: jax.Array,
    *where: jax.Array,
) -> jax.Array:
    return pl.pallas_call(
        functools.partial(_small_kernel, layout, is_sum),
        grid=(pl.cdiv(x.size, SMALL_TILE),),
        out_shape=jax.ShapeDtypeStruct(out_shape, x.dtype),
        compiler_params=plt.CompilerParams(num_warps=SMALL_TILE // PACKED // 32, num_stages=1),
        name=name,
    )(x, *where)


def _small_kernel(
    layout: InboxLayout,
    is_sum: bool,
    x_ref: Any,
    addresses_ref: Any,
    origin_ref: Any,
    calls_before_ref: Any,
    *rest: Any,
) -> None:
    *residual_ref, out_ref = rest
    where = pl.program_id(0) * SMALL_TILE + jnp.arange(SMALL_TILE)
    is_real = where < x_ref.size
    x = plt.load(_at(x_ref, where), mask=is_real, other=0)
    parts = _exchange(layout, x, where, addresses_ref, origin_ref, calls_before_ref)
    if is_sum:
        _store(out_ref, where, is_real, add_up(parts), *residual_ref)
        return
    for sender, part in enumerate(parts):
        plt.store(_at(out_ref, where + sender * x_ref.size), part, mask=is_real)


def _exchange(
    layout: InboxLayout,
    x: jax.Array,
    where: jax.Array,
    addresses_ref: Any,
    origin_ref: Any,
    calls_before_ref: Any,
) -> list[jax.Array]:
    """Send numbers to all GPUs in packets; return those of each.

    Args:
        layout: Of the inboxes.
        x: The program's numbers.
        where: Their places in the array.
        addresses_ref: As all kernels have it, and the following.
        origin_ref: Likewise.
        calls_before_ref: Likewise.
    """
    num_gpus = layout.num_gpus
    rank, call = origin_ref[0], origin_ref[1] + calls_before_ref[0]
    first = (call & 1) * num_gpus * layout.packet_bytes + where * 4

    def everywhere(scalar: Any) -> jax.Array:
        return jnp.broadcast_to(scalar, where.shape)

    own = [addresses_ref[rank, half] for half in (0, 1)]
    inboxes = [addresses_ref[gpu, half] for gpu in range(num_gpus) for half in (0, 1)]
    inboxes_and_target = [*map(everywhere, inboxes), first + rank * layout.packet_bytes]
    receive = [*map(everywhere, (*own, call)), first]
    parts: list[jax.Array] = []
    for sender in range(num_gpus):
        # Each one waits for the results before, so nobody waits for packets before it has sent.
        before = [*inboxes_and_target, x] if sender == 0 else [parts[-1]]
        parts += plt.elementwise_inline_asm(
            _exchange_packets(num_gpus, sender, layout.packet_bytes),
            args=[*before, *receive],
            constraints=_constraints(2, _num_registers([*before, *receive])),
            pack=PACKED,
            result_shape_dtypes=[jax.ShapeDtypeStruct(where.shape, x.dtype)],
        )
    return parts


def _exchange_packets(num_gpus: int, sender: int, packet_bytes: int) -> str:
    """PTX: send two words to every GPU (for the first sender only), return those of a sender.

    Operands: the two words received; for the first sender every inbox (low, high), where to send to
    in it, and two words to send, for others two words of no matter; then the own inbox, the call,
    and where the first sender's packets arrive. All but words are four registers, of which the
    first counts.
    """
    lines = [".reg .b64 a, o; .reg .b32 f, g, n; .reg .pred p;"]
    next_operand = 2
    if sender == 0:
        inboxes = [2 + PACKED * i for i in range(2 * num_gpus)]
        target = 2 + PACKED * 2 * num_gpus
        data = target + PACKED
        next_operand = data
        lines.append(f"cvt.u64.u32 o, ${target};")
    low, high, call, receive = (next_operand + 2 + PACKED * i for i in range(4))
    if sender == 0:
        for gpu in range(num_gpus):
            lines += [
                f"mov.b64 a, {{${inboxes[2 * gpu]}, ${inboxes[2 * gpu + 1]}}};",
                "add.s64 a, a, o;",
                f"st.volatile.global.v4.b32 [a], {{${data}, ${call}, ${data + 1}, ${call}}};",
            ]
    lines += [
        f"mov.b64 a, {{${low}, ${high}}};",
        f"cvt.u64.u32 o, ${receive};",
        "add.s64 a, a, o;",
        "mov.b32 n, 0;",
        "WAIT:",
        f"ld.volatile.global.v4.b32 {{$0, f, $1, g}}, [a + {sender * packet_bytes}];",
        f"setp.eq.b32 p, f, ${call};",
        f"setp.eq.and.b32 p, g, ${call}, p;",
        "@p bra DONE;",
        "add.u32 n, n, 1;",
        f"setp.lt.u32 p, n, {POLLS};",
        "@p bra WAIT;",
        "trap;",
        "DONE:",
    ]
    return _scoped(lines)


def _num_registers(args: list[jax.Array]) -> int:
    return sum(PACKED * arg.dtype.itemsize // 4 for arg in args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _add_rows(
    layout: InboxLayout,
    problem: RowProblem,
    padded: int,
    like: jax.ShapeDtypeStruct,
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
    num_warps = min(MAX_WARPS, padded // PACKED // 32)
    outputs = pl.pallas_call(
        functools.partial(_rows_kernel, layout, problem, padded, like.shape[1]),
        grid=(like.shape[0],),
        out_shape=(like,) * (1 + len(problem.norms)),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        name="all_reduce_norm_small",
    )(*arrays)
    return tuple(outputs)


def _rows_kernel(
    layout: InboxLayout,
    problem: RowProblem,
    padded: int,
    num_columns: int,
    addresses_ref: Any,
    origin_ref: Any,
    calls_before_ref: Any,
    *row_refs: Any,
) -> None:
    """As the small kernel, but a program has a whole row, so that it can normalise it."""

    def over_gpus(x: jax.Array, where: jax.Array) -> jax.Array:
        parts = _exchange(layout, x, where, addresses_ref, origin_ref, calls_before_ref)
        return add_up(parts).astype(x.dtype)

    add_row(problem, padded, num_columns, over_gpus, *row_refs)


@functools.partial(jax.jit, static_argnums=0)
def _add_large(layout: InboxLayout, x: jax.Array, *where: jax.Array) -> jax.Array:
    return _call_large(layout, None, x, *where)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add_large_rows(
    layout: InboxLayout, eps: float, x: jax.Array, *others: jax.Array
) -> tuple[jax.Array, jax.Array]:
    total, normed = _call_large(layout, eps, x, *others)
    return total, normed


def _call_large(
    layout: InboxLayout, eps: float | None, x: jax.Array, *others: jax.Array
) -> Sequence[jax.Array]:
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    outputs: Sequence[jax.Array] = pl.pallas_call(
        functools.partial(_large_kernel, layout, eps),
        grid=(layout.num_programs,),
        out_shape=(like,) if eps is None else (like, like),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        name="all_reduce_large" if eps is None else "all_reduce_norm_large",
    )(x, *others)
    return outputs


def _large_kernel(
    layout: InboxLayout,
    eps: float | None,
    x_ref: Any,
    addresses_ref: Any,
    origin_ref: Any,
    calls_before_ref: Any,
    *rest: Any,
) -> None:
    if eps is None:
        *residual_ref, out_ref = rest
    else:
        *residual_ref, weight_ref, out_ref, normed_ref = rest
    program, num_programs = pl.program_id(0), layout.num_programs
    size = x_ref.size
    rank, call = origin_ref[0], origin_ref[1] + calls_before_ref[0]
    parity = call & 1
    peer_inbox = [addresses_ref[1 - rank, half] for half in (0, 1)]
    own_inbox = [addresses_ref[rank, half] for half in (0, 1)]
    ring = layout.rings + parity * layout.ring_bytes + program * (RING * LARGE_TILE * 2)
    flags = layout.flags + (parity * num_programs + program) * (4 * layout.flags_per_program)
    lanes = jnp.arange(LARGE_TILE)
    num_tiles = pl.cdiv(size, LARGE_TILE)
    count = lax.div(num_tiles - program + (num_programs - 1), jnp.int32(num_programs))

    def everywhere(scalar: Any) -> jax.Array:
        return jnp.broadcast_to(scalar, (LARGE_TILE,))

    def flag(asm: str, value: jax.Array, inbox: list[jax.Array], number: jax.Array) -> jax.Array:
        args = (value, *inbox, flags + 4 * number)
        (done,) = plt.elementwise_inline_asm(
            asm,
            args=[jnp.broadcast_to(arg, (1,)) for arg in args],
            constraints=_constraints(1, 4),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
        )
        return jnp.sum(done)

    def load(number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        where = (program + number * num_programs) * LARGE_TILE + lanes
        is_real = where < size
        place = ring + lax.rem(number, jnp.int32(RING)) * (LARGE_TILE * 2) + lanes * 2
        return plt.load(_at(x_ref, where), mask=is_real, other=0.0), where, is_real, place

    def send(number: jax.Array) -> None:
        x, _, _, place = load(number)
        (sent,) = plt.elementwise_inline_asm(
            _SEND,
            args=[x, *map(everywhere, peer_inbox), place],
            constraints=_constraints(8, 4 + 3 * 8),
            pack=VECTOR,
            result_shape_dtypes=[jax.ShapeDtypeStruct((LARGE_TILE,), jnp.int32)],
        )
        # The sum is a barrier of the program's threads: all have sent when one raises the flag,
        # whose fence then counts for all.
        _keep(flag(_RAISE, call + jnp.sum(sent), peer_inbox, number), out_ref)

    def receive(number: jax.Array) -> None:
        x, where, is_real, place = load(number)
        is_there = flag(_AWAIT, call, own_inbox, number)
        (theirs,) = plt.elementwise_inline_asm(
            _RECEIVE,
            args=[*map(everywhere, own_inbox), place + is_there],
            constraints=_constraints(4, 3 * 8),
            pack=VECTOR,
            result_shape_dtypes=[jax.ShapeDtypeStruct((LARGE_TILE,), x.dtype)],
        )
        total = _store(out_ref, where, is_real, add_up([x, theirs]), *residual_ref)
        if eps is not None:
            num_columns = out_ref.shape[1]  # a tile is some whole rows
            rows = jnp.reshape(total, (LARGE_TILE // num_columns, num_columns))
            weight = plt.load(weight_ref.at[jnp.arange(num_columns)])
            kind = NormKind("rms", eps, offset=0.0, has_weight=True, has_bias=False)
            normed = normalised(rows, kind, [weight[None, :]], num_columns).reshape(total.shape)
            plt.store(_at(normed_ref, where), normed, mask=is_real)

    def one(number: jax.Array, nothing: None) -> None:
        @pl.when(number >= DEPTH)
        def _() -> None:
            receive(number - DEPTH)

        @pl.when(number < count)
        def _() -> None:
            send(number)

    lax.fori_loop(0, count + DEPTH, one, None)


def _store(
    out_ref: Any, where: jax.Array, is_real: jax.Array, total: jax.Array, residual_ref: Any = None
) -> jax.Array:
    """Store and return a sum, rounded before a residual is added, as the reference does."""
    total = total.astype(out_ref.dtype)
    if residual_ref is not None:
        total += plt.load(_at(residual_ref, where), mask=is_real, other=0.0)
    plt.store(_at(out_ref, where), total, mask=is_real)
    return total


def _keep(value: jax.Array, out_ref: Any) -> None:
    """Use a result that is always 0, or the compiler drops what makes it."""

    @pl.when(value != 0)
    def _() -> None:
        out_ref[0, 0] = jnp.zeros((), out_ref.dtype)


def _at(ref: Any, where: jax.Array) -> Any:
    """The numbers of a matrix at some places, counted row by row.

    Matrices stay matrices, as XLA does not fuse a norm with a sum that comes as a vector.
    """
    num_columns = ref.shape[1]
    return ref.at[lax.div(where, num_columns), lax.rem(where, num_columns)]


def _scoped(lines: list[str]) -> str:
    """A block of its own, so that names and labels can stand in a program more than once."""
    return "\n".join(["{", *lines, "}"])


def _constraints(num_outputs: int, num_inputs: int) -> str:
    # Outputs are written while inputs are still to be read ("&").
    return ",".join(["=&r"] * num_outputs + ["r"] * num_inputs)


# Operands: 8 results, all 0; 4 registers of data; of each argument 8 registers, the first counts:
# the peer's inbox (low, high) and the place in it.
_SEND = _scoped(
    [
        ".reg .b64 a, o;",
        "mov.b64 a, {$12, $20};",
        "cvt.u64.u32 o, $28;",
        "add.s64 a, a, o;",
        "st.global.v4.b32 [a], {$8, $9, $10, $11};",
        *(f"mov.b32 ${i}, 0;" for i in range(8)),
    ]
)
# Operands: 4 registers of data; the own inbox and the place.
_RECEIVE = _scoped(
    [
        ".reg .b64 a, o;",
        "mov.b64 a, {$4, $12};",
        "cvt.u64.u32 o, $20;",
        "add.s64 a, a, o;",
        "ld.relaxed.sys.global.v4.b32 {$0, $1, $2, $3}, [a];",
    ]
)
# Operands: a result, 0; the call; an inbox; the flag's place.
_FLAG_ADDRESS = [
    ".reg .b64 a, o; .reg .b32 f, n; .reg .pred p;",
    "mov.b64 a, {$2, $3};",
    "cvt.u64.u32 o, $4;",
    "add.s64 a, a, o;",
]
_RAISE = _scoped(
    [
        *_FLAG_ADDRESS,
        "mov.u32 f, %tid.x;",
        "setp.eq.u32 p, f, 0;",
        "@p fence.acq_rel.sys;",
        "@p st.relaxed.sys.global.b32 [a], $1;",
        "mov.b32 $0, 0;",
    ]
)
_AWAIT = _scoped(
    [
        *_FLAG_ADDRESS,
        "mov.b32 n, 0;",
        "WAIT:",
        "ld.acquire.sys.global.b32 f, [a];",
        "setp.eq.b32 p, f, $1;",
        "@p bra DONE;",
        "add.u32 n, n, 1;",
        f"setp.lt.u32 p, n, {POLLS};",
        "@p bra WAIT;",
        "trap;",
        "DONE:",
        "mov.b32 $0, 0;",
    ]
)
