"""The first half of a gated feed-forward layer as one Pallas Mosaic GPU kernel, for Hopper.

``activation(x Wg^T + bg) * (x Wu^T + bu)`` for many rows. As two operations the product writes 2F
numbers a row to memory, and the activation reads them again and writes F; here they never leave the
registers.

A persistent program per SM walks the output in tiles of 128 rows. A producer warpgroup copies
stretches of the rows and of both weights into a ring in shared memory and runs ahead over the ends
of tiles. Two consumer warpgroups multiply 64 rows each with a gate tile and an up tile that lie
side by side, so that a thread has both numbers of its outputs. Programs of a cluster take tiles
below each other and share the weights: each fetches a part for all. The second consumer may start
``lag`` stretches late, so that one multiplies while the other computes its activations. Tiles are
as wide as lets all SMs finish at about the same time, which counts where there are few rows.
Source: the schedule is that of CUTLASS 3's warp-specialised persistent kernels.
Limits: bfloat16 or float16; whole tiles; else NotImplementedError. A product without a gate is
left to XLA, whose matrix products take a bias and an activation along.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxengine.pallas_kernels.activations import erf
from jaxengine.pallas_kernels.target import DEFAULT_NUM_SMS
from jaxtyping import Array, Float

LOG2_E = 1.4426950408889634
ROWS = 64  # matrix rows of a warpgroup: the M of wgmma
CONSUMERS = 2
PRODUCER = CONSUMERS  # index of the warpgroup
TILE_ROWS = ROWS * CONSUMERS
# Of the output. A gate and an up tile are the columns of one wgmma, which has 256 at most.
TILE_COLUMNS = (128, 112, 96, 80, 64, 48, 32)
TILE_COST = 16  # what a tile costs beside its columns, in columns: its rows and its ends
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
COPIES = 3  # into a slot of the ring: rows, gate, up
# Rows from which on two programs share weights. Long products are limited by power, and a third
# fewer bytes from the L2 cache save 2 % of it; at 512 and 1,024 rows that costs 5 to 10 % of the
# time instead (benchmarks/LOG.md).
SHARING_MIN_ROWS = 2048


def _logistic(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp2(x * -LOG2_E))


def _gelu_by_tanh(x: jax.Array) -> jax.Array:
    # (1 + tanh(u)) / 2 is the logistic function of 2u.
    return x * _logistic(x * (GELU_SLOPE + (GELU_SLOPE * 0.044715) * x * x))


# In operations that Mosaic has.
MOSAIC_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: 0.5 * x * (1.0 + erf(x * math.sqrt(0.5))),
    "gelu_new": _gelu_by_tanh,
    "gelu_pytorch_tanh": _gelu_by_tanh,
    "gelu_fast": _gelu_by_tanh,
    "quick_gelu": lambda x: x * _logistic(1.702 * x),
    "relu": lambda x: jnp.maximum(x, 0.0),
    "relu2": lambda x: jnp.maximum(x, 0.0) * jnp.maximum(x, 0.0),
}


@dataclass(frozen=True)
class GatedProductConfig:
    """How the kernel cuts and pipelines its work. A lag has gained nothing yet (benchmarks/LOG.md).

    Attributes:
        tile_k: Length of a stretch of the inner dimension.
        num_stages: Stretches in shared memory.
        cluster: Programs that share weights.
        lag: Stretches by which the second consumer starts late.
        band: Tiles below each other that are taken before the next ones to the right.
        tile_columns: Columns of an output tile; 0 takes what suits the shape.
    """

    tile_k: int = 64
    num_stages: int = 4
    cluster: int = 1
    lag: int = 0
    band: int = 8
    tile_columns: int = 0

    def __post_init__(self) -> None:
        """Refuse a lag for which the ring is too short: nobody would ever start."""
        if self.lag >= self.num_stages:
            raise ValueError(
                f"lag is {self.lag} but there are {self.num_stages} stages: raise num_stages"
            )


def default_config(num_rows: int) -> GatedProductConfig:
    """Return the configuration for Hopper, as measured on an H100 (benchmarks/LOG.md)."""
    is_shared = num_rows >= SHARING_MIN_ROWS and num_rows % (2 * TILE_ROWS) == 0
    return GatedProductConfig(cluster=2 if is_shared else 1)


class _Problem(NamedTuple):
    """What is fixed at compile time."""

    config: GatedProductConfig
    num_steps: int  # stretches of the inner dimension
    tile_columns: int
    tiles: tuple[int, int]  # of the output, a cluster's worth: down, across
    num_clusters: int
    activation: str
    has_bias: bool
    interpret: Any

    @property
    def cluster_axes(self) -> tuple[str, ...]:
        """Axis of the programs that share weights, if they do."""
        return ("shared",) if self.config.cluster > 1 else ()


class _Refs(NamedTuple):
    """The kernel's arguments."""

    x: Any  # [T, D]
    weight: Any  # [2, F, D]
    bias: Any  # [2, F], or None
    out: Any  # [T, F]
    x_s: Any  # [num_stages, TILE_ROWS, tile_k]
    weight_s: Any  # [num_stages, 2 tile_columns, tile_k]
    out_s: Any  # [CONSUMERS, ROWS, tile_columns]
    full: Any
    free: Any
    start: Any
    done: Any


def gated_product_mosaic(
    x: Float[Array, "T D"],
    weight: Float[Array, "2 F D"],
    bias: Float[Array, "2 F"] | None = None,
    *,
    activation: str = "silu",
    num_sms: int = DEFAULT_NUM_SMS,
    config: GatedProductConfig | None = None,
    interpret: Any = None,
) -> Float[Array, "T F"]:
    """Return ``activation(x gate^T + b) * (x up^T + b)``, accumulated and activated in float32.

    Args:
        x: Rows.
        weight: Gate and up.
        bias: Of both; None for none.
        activation: A key of ``ACTIVATIONS``.
        num_sms: Of the GPU.
        config: Tile sizes and schedule; None for the default of the number of rows.
        interpret: ``plgpu.InterpretGPUParams`` to run on the CPU, slowly, for tests.

    Raises:
        NotImplementedError: For a dtype, shape or jax version not served.
    """
    config = config or default_config(x.shape[0])
    _check_supported(x, weight, config)
    tiles_down, num_columns = x.shape[0] // (TILE_ROWS * config.cluster), weight.shape[1]
    num_clusters = num_sms // config.cluster
    columns = config.tile_columns or best_tile_columns(tiles_down, num_columns, num_clusters)
    tiles = tiles_down, num_columns // columns
    problem = _Problem(
        config=config,
        num_steps=x.shape[1] // config.tile_k,
        tile_columns=columns,
        tiles=tiles,
        num_clusters=min(num_clusters, tiles[0] * tiles[1]),
        activation=activation,
        has_bias=bias is not None,
        interpret=interpret,
    )
    return _call(problem, x, weight, *([] if bias is None else [bias]))


def best_tile_columns(tiles_down: int, num_columns: int, num_clusters: int) -> int:
    """Return the width of tiles with which the last of the clusters is done first.

    Args:
        tiles_down: Tiles below each other, in heights of a cluster.
        num_columns: F, a multiple of one of ``TILE_COLUMNS``.
        num_clusters: Clusters that run at the same time.
    """

    def cost(columns: int) -> int:
        num_tiles = tiles_down * (num_columns // columns)
        return -(-num_tiles // num_clusters) * (columns + TILE_COST)

    return min((c for c in TILE_COLUMNS if num_columns % c == 0), key=cost)


def _check_supported(x: jax.Array, weight: jax.Array, config: GatedProductConfig) -> None:
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"gated Mosaic product: jax {jax.__version__} is too old")
    if x.dtype not in (jnp.bfloat16, jnp.float16) or weight.dtype != x.dtype:
        raise NotImplementedError(f"gated Mosaic product: {x.dtype} rows, {weight.dtype} weight")
    widths = (config.tile_columns,) if config.tile_columns else TILE_COLUMNS
    if all(weight.shape[1] % width for width in widths):
        raise NotImplementedError(
            f"gated Mosaic product: F is {weight.shape[1]}, not a multiple of any of {widths}"
        )
    if x.shape[1] <= config.lag * config.tile_k:
        raise NotImplementedError(f"gated Mosaic product: D is {x.shape[1]}, shorter than the lag")
    for name, size, unit in (
        ("T", x.shape[0], TILE_ROWS * config.cluster),
        ("D", x.shape[1], config.tile_k),
    ):
        if size % unit:
            raise NotImplementedError(f"gated Mosaic product: {name} is {size}, not n * {unit}")


@functools.partial(jax.jit, static_argnums=0)  # jitted: lowered once for all layers
def _call(problem: _Problem, x: jax.Array, weight: jax.Array, *bias: jax.Array) -> jax.Array:
    config = problem.config
    kernel = plgpu.kernel(
        functools.partial(_body, problem),
        out_type=jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype),
        scratch_types=_scratch_types(problem, x.dtype),
        grid=(problem.num_clusters,),
        grid_names=("program",),
        cluster=(config.cluster,) if problem.cluster_axes else (),
        cluster_names=problem.cluster_axes,
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="gated_product_mosaic",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        **({"interpret": problem.interpret} if problem.interpret else {}),
    )
    return kernel(x, weight, *bias)


def _scratch_types(problem: _Problem, dtype: Any) -> list[Any]:
    config = problem.config
    stages, row_bytes = config.num_stages, config.tile_k * dtype.itemsize
    tiled = (plgpu.TilingTransform((8, config.tile_k)), plgpu.SwizzleTransform(row_bytes))
    columns = problem.tile_columns
    out_swizzle = plgpu.find_swizzle(columns * dtype.itemsize * 8)
    tiled_out = (
        plgpu.TilingTransform((8, out_swizzle // dtype.itemsize)),
        plgpu.SwizzleTransform(out_swizzle),
    )
    free: Any = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    if problem.cluster_axes:
        free = plgpu.ClusterBarrier(
            collective_axes=problem.cluster_axes, num_arrivals=CONSUMERS, num_barriers=stages
        )
    return [
        plgpu.SMEM((stages, TILE_ROWS, config.tile_k), dtype, transforms=tiled),
        plgpu.SMEM((stages, 2 * columns, config.tile_k), dtype, transforms=tiled),
        plgpu.SMEM((CONSUMERS, ROWS, columns), dtype, transforms=tiled_out),
        plgpu.Barrier(num_arrivals=COPIES, num_barriers=stages),
        free,
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=CONSUMERS + 1),
    ]


def _body(problem: _Problem, *refs: Any) -> None:
    num_inputs = 2 + problem.has_bias
    kernel = _Refs(*refs[:num_inputs], *([] if problem.has_bias else [None]), *refs[num_inputs:])
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _produce(problem, kernel)

    @pl.when(warpgroup != PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        _consume(problem, kernel, warpgroup)

    # No warpgroup may leave while another still multiplies: the GPU calls it illegal.
    plgpu.barrier_arrive(kernel.done)
    plgpu.barrier_wait(kernel.done)


def _for_each_tile(problem: _Problem, visit: Any) -> jax.Array:
    """Call ``visit(round, row, column, ring)`` for this program's tiles.

    Neighbours in time are neighbours in place, so that what they share is in the L2 cache.

    Returns:
        The position in the ring behind the last tile.
    """
    program, num_clusters = lax.axis_index("program"), problem.num_clusters
    cluster = problem.config.cluster
    place = lax.axis_index("shared") if problem.cluster_axes else 0
    num_tiles = problem.tiles[0] * problem.tiles[1]

    def one_round(i: jax.Array, ring: jax.Array) -> jax.Array:
        index = program + i * num_clusters
        down, across = plgpu.planar_snake(index, problem.tiles, 0, problem.config.band)
        visit(i, (down * cluster + place) * TILE_ROWS, across * problem.tile_columns, ring)
        return ring + problem.num_steps

    num_rounds = lax.div(num_tiles - program + (num_clusters - 1), jnp.int32(num_clusters))
    return lax.fori_loop(0, num_rounds, one_round, jnp.int32(0))


def _produce(problem: _Problem, refs: _Refs) -> None:
    config = problem.config
    columns = problem.tile_columns
    shared = problem.cluster_axes[0] if problem.cluster_axes else None

    def visit(i: jax.Array, row: jax.Array, column: jax.Array, ring: jax.Array) -> None:
        del i

        def load(step: jax.Array, nothing: None) -> None:
            slot = lax.rem(ring + step, jnp.int32(config.num_stages))
            stretch = pl.ds(step * config.tile_k, config.tile_k)

            @pl.when(ring + step >= config.num_stages)
            def _() -> None:
                plgpu.barrier_wait(refs.free.at[slot])

            full = refs.full.at[slot]
            rows = refs.x.at[pl.ds(row, TILE_ROWS), stretch]
            plgpu.copy_gmem_to_smem(rows, refs.x_s.at[slot], full)
            for part in (0, 1):
                source = refs.weight.at[part, pl.ds(column, columns), stretch]
                target = refs.weight_s.at[slot, pl.ds(part * columns, columns)]
                plgpu.copy_gmem_to_smem(source, target, full, collective_axes=shared)

        lax.fori_loop(0, problem.num_steps, load, None)

    num_loaded = _for_each_tile(problem, visit)

    # Every completion of a barrier has to be awaited before the program ends.
    def drain(ring: jax.Array, _: None) -> None:
        plgpu.barrier_wait(refs.free.at[lax.rem(ring, jnp.int32(config.num_stages))])

    lax.fori_loop(jnp.maximum(num_loaded - config.num_stages, 0), num_loaded, drain, None)


def _consume(problem: _Problem, refs: _Refs, warpgroup: jax.Array) -> None:
    config, columns = problem.config, problem.tile_columns

    def bias_of(side: int, column: jax.Array) -> jax.Array:
        layout = plgpu.Layout.WGMMA.reduce(0)
        numbers = plgpu.load(
            refs.bias, (side, pl.ds(column, columns)), layout=layout, optimized=False
        )
        return lax.broadcast_in_dim(numbers.astype(jnp.float32), (ROWS, columns), (1,))

    def visit(i: jax.Array, row: jax.Array, column: jax.Array, ring: jax.Array) -> None:
        def slot_of(step: jax.Array) -> jax.Array:
            return lax.rem(ring + step, jnp.int32(config.num_stages))

        def multiply(acc_ref: Any) -> jax.Array:
            def one_step(step: jax.Array, nothing: None) -> None:
                slot = slot_of(step)
                plgpu.barrier_wait(refs.full.at[slot])
                rows = refs.x_s.at[slot, pl.ds(warpgroup * ROWS, ROWS)]
                plgpu.wgmma(acc_ref, rows, refs.weight_s.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(1)  # for the step before

                @pl.when(step > 0)
                def _() -> None:
                    plgpu.barrier_arrive(refs.free.at[slot_of(step - 1)])

                if config.lag:

                    @pl.when((i == 0) & (step == config.lag) & (warpgroup == 0))
                    def _() -> None:
                        plgpu.barrier_arrive(refs.start)

            lax.fori_loop(0, problem.num_steps, one_step, None)
            return acc_ref[...]

        acc = pl.run_scoped(multiply, plgpu.ACC((ROWS, 2 * columns), jnp.float32))
        acc = lax.optimization_barrier(acc)
        plgpu.barrier_arrive(refs.free.at[slot_of(jnp.int32(problem.num_steps - 1))])
        gate, up = acc[:, :columns], acc[:, columns:]
        if problem.has_bias:
            gate, up = gate + bias_of(0, column), up + bias_of(1, column)
        if problem.activation in ("silu", "swish"):
            out = (gate * up / (1 + jnp.exp2(gate * -LOG2_E))).astype(refs.out.dtype)
        else:
            out = (MOSAIC_ACTIVATIONS[problem.activation](gate) * up).astype(refs.out.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before
        refs.out_s.at[warpgroup][...] = out
        plgpu.commit_smem()
        target = refs.out.at[pl.ds(row + warpgroup * ROWS, ROWS), pl.ds(column, columns)]
        plgpu.copy_smem_to_gmem(refs.out_s.at[warpgroup], target)

    if config.lag:

        @pl.when(warpgroup == 1)
        def _() -> None:
            plgpu.barrier_wait(refs.start)

    _for_each_tile(problem, visit)
    plgpu.wait_smem_to_gmem(0)
