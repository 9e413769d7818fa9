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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.norms import add_up, joining, sum_addends
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.peers import DEPTH, LARGE_TILE, RING, SMALL_TILE, InboxLayout, Peers
from jaxengine.pallas_kernels.residual_norm_triton import add_row, normalised
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
    inner: Norm | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Float[Array, "T D"], tuple[Float[Array, "T D"], ...]]:
    """Return the sum over all GPUs with the residual added, and its norms, as ``residual_norm``.

    Args:
        addends: This GPU's; added up and rounded to the residual's dtype before they are sent.
        peers: Where to write, and the number of the call.
        residual: The same on all GPUs.
        norms: Of the stream.
        inner: Norm of the sum; None for none.
        scale: Factor on the sum.

    Raises:
        NotImplementedError: For a dtype or a size not served.
    """
    layout, (num_rows, num_columns) = peers.layout, residual.shape
    if residual.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"all-reduce in Triton: {residual.dtype}, not of 16 bits")
    if num_columns % PACKED:  # a thread's numbers lie in one row, side by side
        raise NotImplementedError(f"all-reduce in Triton: D is {num_columns}, not n * {PACKED}")
    padded = max(PACKED * 32, pl.next_power_of_2(num_columns))
    if num_rows * padded <= layout.small_elements and padded <= MAX_ROW:
        return _add_rows(layout, scale, padded, addends, *_where(peers), residual, norms, inner)
    fits = residual.size <= layout.large_elements and LARGE_TILE % num_columns == 0
    if not (fits and layout.num_gpus == 2 and num_columns >= VECTOR):
        raise NotImplementedError(f"all-reduce in Triton, with norm: {residual.shape}, {layout}")
    x = sum_addends(addends, residual.dtype, with_bias=False)
    return _add_large_rows(layout, scale, x, *_where(peers), residual, addends.bias, norms, inner)


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _add_rows(
    layout: InboxLayout, scale: float, padded: int, addends: Addends, *others: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    *_, residual, norms, _ = others
    like = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    num_warps = min(MAX_WARPS, padded // PACKED // 32)
    total, normed = pl.pallas_call(
        functools.partial(_rows_kernel, layout, scale, padded),
        grid=(residual.shape[0],),
        out_shape=(like, (like,) * len(norms)),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        name="all_reduce_norm_small",
    )(addends, *others)
    return total, normed


def _rows_kernel(
    layout: InboxLayout,
    scale: float,
    padded: int,
    addends: Addends,
    addresses_ref: Any,
    origin_ref: Any,
    calls_before_ref: Any,
    *row_refs: Any,
) -> None:
    """As the small kernel, but a program has a whole row, so that it can normalise it."""

    def over_gpus(x: jax.Array, where: jax.Array) -> jax.Array:
        parts = _exchange(layout, x, where, addresses_ref, origin_ref, calls_before_ref)
        return add_up(parts)

    add_row(scale, padded, over_gpus, addends, *row_refs)


@functools.partial(jax.jit, static_argnums=0)
def _add_large(layout: InboxLayout, x: jax.Array, *others: jax.Array) -> jax.Array:
    where, residual = others[:3], others[3:]
    total, _ = _call_large(layout, 1.0, x, *where, *(residual or (None,)), None, (), None)
    return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _add_large_rows(
    layout: InboxLayout, scale: float, x: jax.Array, *others: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _call_large(layout, scale, x, *others)


def _call_large(
    layout: InboxLayout, scale: float, x: jax.Array, *others: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    *_, norms, inner = others
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, normed = pl.pallas_call(
        functools.partial(_large_kernel, layout, scale),
        grid=(layout.num_programs,),
        out_shape=(like, (like,) * len(norms)),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        name="all_reduce_norm_large" if norms or inner else "all_reduce_large",
    )(x, *others)
    return total, normed


def _large_kernel(
    layout: InboxLayout,
    scale: float,
    x_ref: Any,
    addresses_ref: Any,
    origin_ref: Any,
    calls_before_ref: Any,
    residual_ref: Any,
    bias_ref: Any,
    norms: tuple[Norm, ...],
    inner: Norm | None,
    out_ref: Any,
    normed_refs: tuple[Any, ...],
) -> None:
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
        num_columns = out_ref.shape[1]  # with norms, a tile is some whole rows

        def norm_of(x: jax.Array, norm: Norm) -> jax.Array:
            rows = jnp.reshape(x, (LARGE_TILE // num_columns, num_columns))
            columns = jnp.arange(num_columns)
            loaded = jax.tree.map(lambda ref: plt.load(ref.at[columns])[None, :], norm)
            return jnp.reshape(normalised(rows, loaded, num_columns, None), x.shape)

        bias = None if bias_ref is None else plt.load(bias_ref.at[lax.rem(where, num_columns)])
        joined = joining(
            add_up([x, theirs]),
            out_ref.dtype,
            bias=bias,
            inner=None if inner is None else functools.partial(norm_of, norm=inner),
            scale=scale,
        )
        total = _store(out_ref, where, is_real, joined, residual_ref)
        for norm, normed_ref in zip(norms, normed_refs, strict=True):
            plt.store(_at(normed_ref, where), norm_of(total, norm), mask=is_real)

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
