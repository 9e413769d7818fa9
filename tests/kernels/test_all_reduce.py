"""The sum over GPUs that write to each other: its memory, its protocol, and on two GPUs itself."""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxengine.pallas_kernels import all_reduce_triton
from jaxengine.pallas_kernels.all_reduce import all_gather, all_reduce
from jaxengine.pallas_kernels.all_reduce_triton import all_reduce_norm_triton
from jaxengine.pallas_kernels.operands import Addends, Norm
from jaxengine.pallas_kernels.peers import DEPTH, RING, InboxLayout, Peers, inbox_layout
from jaxengine.pallas_kernels.residual_norm import normalise, residual_norm
from jaxengine.pallas_kernels.target import Target

from tests.kernels.h100 import h100s, lower_for_cuda

AXIS = "tp"
EPS = 1e-5
GPU = Target("gpu")
SMALL = InboxLayout(num_gpus=2, small_elements=1 << 16, large_elements=0, num_programs=0)
BOTH = InboxLayout(num_gpus=2, small_elements=1 << 12, large_elements=1 << 25, num_programs=264)
FEW_PROGRAMS = InboxLayout(2, 1 << 12, 1 << 20, num_programs=4)


def peers_of(layout: InboxLayout) -> Peers:
    zeros = jnp.zeros((layout.num_gpus, 2), jnp.int32)
    return Peers(zeros, jnp.zeros(2, jnp.int32), np.int32(0), layout)


@pytest.mark.parametrize(
    "layout", [SMALL, BOTH, inbox_layout(8, 1 << 20, GPU), inbox_layout(2, 1 << 9, GPU)]
)
def test_packets_rings_and_flags_do_not_overlap(layout: InboxLayout) -> None:
    assert layout.packet_bytes * 2 * layout.num_gpus <= layout.rings
    assert layout.rings + 2 * layout.ring_bytes == layout.flags
    num_flags = layout.num_programs * layout.flags_per_program
    assert layout.flags + 2 * 4 * num_flags == layout.num_bytes
    assert layout.num_bytes < 2**31  # offsets are int32
    assert layout.packet_bytes >= 4 * layout.small_elements  # half of a packet is its flag


def test_sums_in_a_row_have_numbers_in_a_row() -> None:
    later = peers_of(SMALL).after(1).after(2)
    assert later.calls_before == 3
    assert isinstance(later.calls_before, np.int32)  # a constant of the program


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "reason"),
    [
        ((8, 64), "float32", SMALL, "not of 16 bits"),
        ((3, 30), "bfloat16", SMALL, r"D is 30, not n \* 4"),
        ((2048, 64), "bfloat16", SMALL, "131072 numbers"),
        ((256, 20), "bfloat16", BOTH, r"D is 20, not n \* 8"),
        ((1 << 20, 64), "bfloat16", BOTH, "67108864 numbers"),
        ((512, 1024), "bfloat16", InboxLayout(4, 1 << 12, 0, 0), "524288 numbers"),
    ],
)
def test_what_the_kernels_do_not_serve_is_refused(
    shape: tuple[int, int], dtype: str, layout: InboxLayout, reason: str
) -> None:
    x = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda x: all_reduce_triton.all_reduce_triton(x, peers_of(layout)), x)


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "reason"),
    [
        ((1, 8, 64), "float32", SMALL, "not of 16 bits"),
        ((1, 3, 30), "bfloat16", SMALL, r"D is 30, not n \* 4"),
        ((1, 2048, 64), "bfloat16", SMALL, r"\(2048, 64\)"),
        ((1, 256, 576), "bfloat16", BOTH, r"\(256, 576\)"),  # no whole rows in a tile
    ],
)
def test_norms_that_the_kernels_do_not_serve_are_refused(
    shape: tuple[int, int, int], dtype: str, layout: InboxLayout, reason: str
) -> None:
    arrays = [jax.ShapeDtypeStruct(shape[i:], dtype) for i in range(3)]

    def run(parts: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
        norms = (Norm(weight, None, EPS),)
        return all_reduce_norm_triton(Addends((parts,)), peers_of(layout), residual, norms)

    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(run, *arrays)


def test_an_unknown_implementation_and_missing_peers_are_named() -> None:
    x = jnp.zeros((2, 4))
    with pytest.raises(ValueError, match="'nccl' is not one of reference, triton"):
        all_reduce(x, None, axis_name=AXIS, implementation="nccl")
    with pytest.raises(ValueError, match="pass peers"):
        all_reduce(x, None, axis_name=AXIS, implementation="triton")


def lower_sum(
    num_gpus: int, shape: tuple[int, int], layout: InboxLayout, num_parts: int = 0
) -> str:
    mesh = h100s(num_gpus, AXIS)

    def add(x: jax.Array, addresses: jax.Array, origin: jax.Array) -> jax.Array:
        peers = Peers(addresses, origin, np.int32(0), layout)
        if num_parts == 0:
            return all_reduce(x, peers, axis_name=AXIS)
        parts = jnp.stack([x] * num_parts)
        if num_parts > 1:
            parts = parts.astype(jnp.float32)
        norms = (Norm(x[0], None, EPS),)
        total, (normed,) = residual_norm(
            Addends((parts,)), x, norms, peers=peers, axis_name=AXIS, target=Target("gpu")
        )
        return total + normed

    specs = (P(AXIS), P(), P())
    shapes = ((num_gpus * shape[0], shape[1]), (num_gpus, 2), (2,))
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, spec, dtype in zip(
            shapes, specs, (jnp.bfloat16, jnp.int32, jnp.int32), strict=True
        )
    ]
    sharded = jax.shard_map(add, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)
    return lower_for_cuda(sharded, *arguments, mesh=mesh)


@pytest.mark.parametrize(
    ("num_gpus", "shape", "kernel"),
    [
        (2, (8, 4096), "all_reduce_small"),
        (2, (3, 576), "all_reduce_small"),
        (2, (128, 4096), "all_reduce_small"),
        (2, (129, 4096), "all_reduce_large"),
        (2, (16384, 4096), "all_reduce_large"),
        (4, (64, 4096), "all_reduce_small"),
        (4, (65, 4096), None),
        (8, (32, 4096), "all_reduce_small"),
        (8, (16384, 8192), None),
    ],
)
def test_every_size_lowers_for_cuda_to_a_kernel_or_to_xlas_sum(
    num_gpus: int, shape: tuple[int, int], kernel: str | None
) -> None:
    text = lower_sum(num_gpus, shape, inbox_layout(num_gpus, 16384 * shape[1], GPU))
    names = {name for name in ("all_reduce_small", "all_reduce_large") if name in text}
    assert names == ({kernel} if kernel else set())
    assert ("stablehlo.all_reduce" in text) == (kernel is None)


@pytest.mark.parametrize(
    ("num_gpus", "shape", "num_parts", "kernels"),
    [
        (2, (8, 4096), 2, {"norm_small"}),
        (2, (3, 576), 1, {"norm_small"}),
        (2, (128, 4096), 1, {"norm_small"}),
        (2, (129, 4096), 1, {"norm_large"}),
        (2, (16384, 2048), 1, {"norm_large"}),
        (2, (512, 5120), 1, {"large"}),  # rows that do not divide a tile: XLA normalises
        (8, (32, 4096), 2, {"norm_small"}),
        (8, (33, 4096), 1, set()),
        (8, (8, 16384), 1, {"small"}),  # no program takes so long a row
    ],
)
def test_every_size_with_a_norm_lowers_for_cuda(
    num_gpus: int, shape: tuple[int, int], num_parts: int, kernels: set[str]
) -> None:
    text = lower_sum(num_gpus, shape, inbox_layout(num_gpus, 16384 * shape[1], GPU), num_parts)
    every_kernel = ("small", "large", "norm_small", "norm_large")
    assert {name for name in every_kernel if f'"all_reduce_{name}' in text} == kernels
    assert ("stablehlo.all_reduce" in text) == (not kernels)


@pytest.fixture
def peer_of_ones(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels in Pallas' interpreter, on few programs, where all that ever arrives are ones."""

    def ones_or_zeros(asm: str, *, result_shape_dtypes: Any, **_: Any) -> list[jax.Array]:
        is_data = "st.volatile" in asm or "ld.volatile" in asm or asm == all_reduce_triton._RECEIVE
        return [jnp.full(r.shape, int(is_data), r.dtype) for r in result_shape_dtypes]

    monkeypatch.setattr(all_reduce_triton.plt, "elementwise_inline_asm", ones_or_zeros)
    call = functools.partial(all_reduce_triton.pl.pallas_call, interpret=True)
    monkeypatch.setattr(all_reduce_triton.pl, "pallas_call", call)
    jax.clear_caches()  # both before and behind: what is traced here is of no use elsewhere
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("peer_of_ones")
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 3, 512), SMALL),
        ((1, 5, 128), SMALL),
        ((1, 30, 1024), FEW_PROGRAMS),  # four tiles of eight rows, not all full
        ((1, 41, 2048), FEW_PROGRAMS),
    ],
    ids=str,
)
def test_what_a_sum_does_to_the_residual_stream_and_its_norm(
    shape: tuple[int, int, int], layout: InboxLayout
) -> None:
    rng = np.random.default_rng(0)
    num_parts, _, num_columns = shape
    parts = jnp.asarray(rng.standard_normal(shape), "bfloat16" if num_parts == 1 else "float32")
    residual = jnp.asarray(rng.standard_normal(shape[1:]), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal(num_columns), jnp.bfloat16)
    norm = Norm(weight, None, EPS)
    total, (normed,) = all_reduce_norm_triton(
        Addends((parts,)), peers_of(layout), residual, (norm,)
    )
    # Of the packets' kernel all parts come from outside, of the tiles' one the peer's alone.
    is_small = layout is SMALL
    both = jnp.full(shape[1:], 2.0, jnp.bfloat16) if is_small else parts[0] + 1
    np.testing.assert_array_equal(total, both + residual)
    expected = np.asarray(normalise(total, norm), np.float32)
    tolerance = 2 * float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(np.asarray(normed, np.float32), expected, rtol=tolerance)


@dataclasses.dataclass
class RingProgram:
    """One program of a large sum: what it does to its peer's ring, step by step, call by call.

    The reference of the schedule in ``_large_kernel``. A ring's place holds (call, tile) or None.
    """

    own: list[list[tuple[int, int] | None]]  # by parity: where the peer writes
    peer: list[list[tuple[int, int] | None]]
    is_taken: Callable[[tuple[int, int]], bool]  # whether the peer has taken in a tile of ours

    def run(self, num_tiles: int, num_calls: int) -> Iterator[None]:
        self.taken: set[tuple[int, int]] = set()
        for call in range(num_calls):
            for number in range(num_tiles + DEPTH):
                if number >= DEPTH:
                    wanted = (call, number - DEPTH)
                    place = wanted[1] % RING
                    while self.own[call % 2][place] != wanted:
                        yield
                    self.taken.add(wanted)
                if number < num_tiles:
                    place = number % RING
                    before = self.peer[call % 2][place]
                    assert before is None or self.is_taken(before), "overwritten before it was read"
                    self.peer[call % 2][place] = (call, number)
                yield


@pytest.mark.parametrize("num_tiles", [1, DEPTH, RING, RING + 1, 31])
@pytest.mark.parametrize("seed", range(20))
def test_no_tile_is_overwritten_before_it_is_read_and_nobody_waits_for_ever(
    num_tiles: int, seed: int
) -> None:
    rng = random.Random(seed)
    inboxes: list[Any] = [[[None] * RING for _ in range(2)] for _ in range(2)]
    programs: list[RingProgram] = []
    for gpu in range(2):

        def is_taken(tile: tuple[int, int], other: int = 1 - gpu) -> bool:
            return tile in programs[other].taken

        programs.append(RingProgram(inboxes[gpu], inboxes[1 - gpu], is_taken))
    running = {gpu: program.run(num_tiles, num_calls=5) for gpu, program in enumerate(programs)}
    likely = rng.random()  # one GPU may be much faster than the other
    for _ in range(100_000):
        gpu = int(rng.random() < likely)
        if gpu in running and next(running[gpu], "done") == "done":
            del running[gpu]
        if not running:
            break
    assert not running
    assert all(len(program.taken) == 5 * num_tiles for program in programs)


@pytest.fixture(scope="module")
def gpus() -> Mesh:
    if jax.default_backend() != "gpu" or len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    return Mesh(np.array(jax.devices()[:2]), (AXIS,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape",
    [(1, 64), (3, 576), (8, 4096), (128, 4096), (129, 4096), (1000, 1024), (4097, 2048)],
    ids=str,
)
def test_two_gpus_have_the_sum_of_both_time_after_time(
    gpus: Mesh, shape: tuple[int, int], dtype: str
) -> None:
    from jaxengine.engine.device.peer_memory import PeerMemory

    memory = PeerMemory(gpus, inbox_layout(2, 16384 * shape[1], GPU))
    memory.allocate()
    num_sums = 5

    def add(x: jax.Array, addresses: jax.Array, first: jax.Array) -> jax.Array:
        origin = jnp.stack([jax.lax.axis_index(AXIS), first])
        peers = Peers(addresses, origin, np.int32(0), memory.layout)
        residuals = [None, jnp.full_like(x, 0.5)]
        sums: list[jax.Array] = []
        for number in range(num_sums):
            part = x * (number + 1)
            if sums:  # a sum has to depend on the one before; this condition is never true
                part = jnp.where(sums[-1] == 1e4, sums[-1], part)
            sums.append(
                all_reduce(
                    part,
                    peers.after(number),
                    axis_name=AXIS,
                    residual=residuals[number % 2],
                )
            )
        return jnp.stack(sums)

    sharded = jax.jit(
        jax.shard_map(
            add,
            mesh=gpus,
            in_specs=(P(AXIS), P(), P()),
            out_specs=P(None, AXIS),
            check_vma=False,
        )
    )
    rng = np.random.default_rng(0)
    for step in range(10):
        parts = jnp.asarray(rng.standard_normal((2, *shape)), dtype)
        x = jax.device_put(parts.reshape(-1, shape[1]), NamedSharding(gpus, P(AXIS)))
        found = np.asarray(sharded(x, memory.addresses, np.int32(1 + step * num_sums)))
        for number in range(num_sums):
            first, second = np.asarray(parts * (number + 1)).astype(np.float32)
            expected = (first + second).astype(found.dtype)
            if number % 2:
                expected = (expected.astype(np.float32) + 0.5).astype(found.dtype)
            for gpu in range(2):
                rows = slice(gpu * shape[0], (gpu + 1) * shape[0])
                np.testing.assert_array_equal(found[number, rows], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 64), (2, 3, 576), (2, 8, 4096), (1, 128, 4096), (1, 129, 4096), (1, 1001, 1024),
     (1, 4096, 2048), (2, 32, 8192)],
    ids=str,
)  # fmt: skip
def test_two_gpus_have_the_norm_of_the_sum_time_after_time(
    gpus: Mesh, shape: tuple[int, int, int], dtype: str
) -> None:
    from jaxengine.engine.device.peer_memory import PeerMemory

    memory = PeerMemory(gpus, inbox_layout(2, 16384 * shape[2], GPU))
    memory.allocate()
    num_layers = 4

    def stream(implementation: str | None) -> Any:
        def run(
            parts: jax.Array, residual: jax.Array, addresses: jax.Array, first: jax.Array
        ) -> jax.Array:
            origin = jnp.stack([jax.lax.axis_index(AXIS), first])
            peers = Peers(addresses, origin, np.int32(0), memory.layout)
            norms: list[jax.Array] = []
            for layer in range(num_layers):
                # What a layer does to the norm, in little.
                more = parts if not norms else parts + norms[-1][None].astype(parts.dtype) / 8
                residual, (normed,) = residual_norm(
                    Addends((more,)),
                    residual,
                    (Norm(residual[0], None, EPS),),
                    peers=peers.after(layer),
                    axis_name=AXIS,
                    target=Target("gpu"),
                    implementation=implementation,
                )
                norms.append(normed)
            return jnp.stack([*norms, residual])

        specs = (P(None, AXIS), P(), P(), P())
        return jax.jit(
            jax.shard_map(run, mesh=gpus, in_specs=specs, out_specs=P(None, AXIS), check_vma=False)
        )

    ours, reference = stream("triton"), stream("reference")
    rng = np.random.default_rng(0)
    parts_dtype = dtype if shape[0] == 1 else "float32"
    parts_shape = (shape[0], 2 * shape[1], shape[2])
    for step in range(6):
        parts = jnp.asarray(rng.standard_normal(parts_shape), parts_dtype)
        parts = jax.device_put(parts, NamedSharding(gpus, P(None, AXIS)))
        residual = jnp.asarray(rng.standard_normal(shape[1:]), dtype)
        rest = (jax.device_put(residual, NamedSharding(gpus, P())), memory.addresses)
        first = np.int32(1 + step * num_layers)
        found = np.asarray(ours(parts, *rest, first)).astype(np.float32)
        expected = np.asarray(reference(parts, *rest, first)).astype(np.float32)
        np.testing.assert_array_equal(found[:, : shape[1]], found[:, shape[1] :])
        tolerance = 16 * float(jnp.finfo(dtype).eps)  # of four layers
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 300, 1024])
def test_two_gpus_know_the_numbers_of_both(gpus: Mesh, num_rows: int) -> None:
    from jaxengine.engine.device.peer_memory import PeerMemory

    memory = PeerMemory(gpus, inbox_layout(2, 1 << 20, GPU))
    memory.allocate()

    def gather(x: jax.Array, addresses: jax.Array, first: jax.Array) -> jax.Array:
        origin = jnp.stack([jax.lax.axis_index(AXIS), first])
        peers = Peers(addresses, origin, np.int32(0), memory.layout)
        return all_gather(x, peers, axis_name=AXIS).reshape(-1, 2)

    sharded = jax.jit(
        jax.shard_map(
            gather, mesh=gpus, in_specs=(P(AXIS), P(), P()), out_specs=P(AXIS), check_vma=False
        )
    )
    rng = np.random.default_rng(0)
    for step in range(5):
        numbers = rng.integers(-(2**31), 2**31, (2, num_rows, 2), dtype=np.int64).astype(np.int32)
        x = jax.device_put(numbers.reshape(-1, 2), NamedSharding(gpus, P(AXIS)))
        found = np.asarray(sharded(x, memory.addresses, np.int32(1 + step)))
        np.testing.assert_array_equal(found, np.concatenate([numbers.reshape(-1, 2)] * 2))
