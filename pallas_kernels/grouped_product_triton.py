"""Products of groups of rows in Pallas Triton, for few rows of a group and for many.

Grid (tiles of the output, tiles of rows): a program multiplies up to ``tile_rows`` rows of one
group (see grouped_tiles.py) with ``tile_out`` rows of that group's weight. Outputs go fastest, so
that programs of one group run together: its weight and its rows come from memory once, and from
the L2 cache for the others. As many programs start as any routing could need; those without a tile
end at once, so that weights which no row needs are never read.

With few rows of a group a step waits for the bytes of the weights: tiles of 16 rows, the least
that the tensor cores take, and long strides through the weight. With many it waits for arithmetic:
tiles of 128. The first product gathers its rows itself, gates and adds biases before it stores; the
second multiplies by the rows' weights.
Limits: bfloat16 or float16, dimensions that tiles divide, fewer than 2**31 weights on a device;
else NotImplementedError.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.activations import KERNEL_ACTIVATIONS
from jaxengine.pallas_kernels.gating import Gating
from jaxengine.pallas_kernels.grouped_tiles import build_grouped_tiles, max_tiles
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class GroupedConfig:
    """How a product is cut and pipelined.

    Attributes:
        tile_rows: Rows that a program takes, of one group.
        tile_out: Rows of the weight that it takes (of gate and up each).
        tile_in: Length of a step of its loop.
        num_stages: Steps whose loads are under way.
    """

    tile_rows: int
    tile_out: int
    tile_in: int
    num_stages: int
    num_warps: int


# By the mean number of rows of a group: the first whose limit is not passed, and in it the first
# whose tiles divide the weight. Sizes are those that the products of few rows and of attention have
# been measured best with; no GPU has run these.
GATED_CONFIGS = (
    (16, (GroupedConfig(16, 16, 256, 3, 2), GroupedConfig(16, 32, 64, 4, 2))),
    (48, (GroupedConfig(32, 32, 128, 3, 4), GroupedConfig(32, 32, 64, 4, 4))),
    (96, (GroupedConfig(64, 64, 64, 3, 4), GroupedConfig(64, 32, 64, 3, 4))),
    (math.inf, (GroupedConfig(128, 64, 64, 3, 8), GroupedConfig(128, 32, 64, 3, 4))),
)
PLAIN_CONFIGS = (
    (16, (GroupedConfig(16, 32, 128, 5, 2), GroupedConfig(16, 32, 64, 5, 2))),
    (48, (GroupedConfig(32, 64, 128, 3, 4), GroupedConfig(32, 64, 64, 4, 4))),
    (96, (GroupedConfig(64, 128, 64, 3, 4), GroupedConfig(64, 64, 64, 3, 4))),
    (math.inf, (GroupedConfig(128, 128, 64, 3, 8), GroupedConfig(128, 64, 64, 3, 8))),
)
# For what none of those divides: 96 outputs of an expert cut over eight GPUs, and the like.
SMALL_TILES = ((32, 32), (16, 32), (16, 16))


@dataclass(frozen=True)
class _Problem:
    """What is fixed at compile time, beside the shapes.

    Attributes:
        has_rows: Whether x is gathered.
        gating: None for the plain product.
    """

    config: GroupedConfig
    has_rows: bool
    has_bias: bool
    has_row_weights: bool
    gating: Gating | None


def grouped_product_triton(
    x: Float[Array, "R I"],
    weight: Float[Array, "E O I"],
    group_sizes: Int[Array, " E"],
    bias: Float[Array, "E O"] | None = None,
    row_weights: Float[Array, " R"] | None = None,
    *,
    config: GroupedConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "R O"]:
    """As ``grouped_product``.

    Args:
        x: Rows sorted by group.
        weight: [out, in] of each group.
        group_sizes: Rows of each group.
        bias: Of each group; None for none.
        row_weights: Factor on each row; None for 1.
        config: Tile sizes; None for the default.
        interpret: Run on the CPU, in Pallas' interpreter.

    Raises:
        NotImplementedError: If the dtype or a size is not served.
    """
    chosen = _choose(x.shape[0], weight, PLAIN_CONFIGS, config)
    problem = _Problem(chosen, False, bias is not None, row_weights is not None, None)
    given = [array for array in (bias, row_weights) if array is not None]
    return _launch(problem, x.shape[0], interpret, x, weight[:, None], group_sizes, *given)


def grouped_gated_product_triton(
    x: Float[Array, "T D"],
    weight: Float[Array, "E 2 F D"],
    group_sizes: Int[Array, " E"],
    rows: Int[Array, " R"] | None = None,
    bias: Float[Array, "E 2 F"] | None = None,
    *,
    gating: Gating,
    config: GroupedConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "R F"]:
    """As ``grouped_gated_product``, gated in float32.

    Args:
        x: Rows, sorted by group or named by ``rows``.
        weight: Gate and up of each group.
        group_sizes: Rows of each group.
        rows: Which row of x each row of the result is made of; None for its own.
        bias: Of both; None for none.
        gating: How the two become one.
        config: Tile sizes; None for the default.
        interpret: Run on the CPU, in Pallas' interpreter.

    Raises:
        NotImplementedError: If the dtype or a size is not served.
    """
    num_rows = (x if rows is None else rows).shape[0]
    chosen = _choose(num_rows, weight, GATED_CONFIGS, config)
    problem = _Problem(chosen, rows is not None, bias is not None, False, gating)
    given = [array for array in (rows, bias) if array is not None]
    return _launch(problem, num_rows, interpret, x, weight, group_sizes, *given)


def _choose(
    num_rows: int,
    weight: jax.Array,
    measured: Sequence[tuple[float, Sequence[GroupedConfig]]],
    config: GroupedConfig | None,
) -> GroupedConfig:
    """Return the first configuration whose tiles divide the weight."""
    num_out, num_in = weight.shape[-2:]
    if weight.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"grouped product in Triton: {weight.dtype}, not of 16 bits")
    if weight.size >= 1 << 31:
        raise NotImplementedError(
            f"grouped product in Triton: {weight.size} weights, more than 32 bits can count"
        )
    if num_rows == 0:
        raise NotImplementedError("grouped product in Triton: no rows")
    mean = num_rows / weight.shape[0]
    configs = next(own for limit, own in measured if mean <= limit)
    small = (GroupedConfig(configs[0].tile_rows, out, step, 3, 4) for out, step in SMALL_TILES)
    for candidate in (config,) if config is not None else (*configs, *small):
        if num_out % candidate.tile_out == 0 and num_in % candidate.tile_in == 0:
            return candidate
    raise NotImplementedError(f"grouped product in Triton: no tiles divide [{num_out}, {num_in}]")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # jitted: lowered once for all layers
def _launch(
    problem: _Problem,
    num_rows: int,
    interpret: bool,
    x: jax.Array,
    weight: Float[Array, "E parts O I"],
    group_sizes: jax.Array,
    *given: jax.Array,
) -> jax.Array:
    config = problem.config
    E, _, num_out, num_in = weight.shape
    tiles = build_grouped_tiles(group_sizes, num_rows, config.tile_rows)
    flat = [array.reshape(-1) if array.ndim > 1 else array for array in given]
    name = "grouped_product" if problem.gating is None else "grouped_gated_product"
    return pl.pallas_call(
        functools.partial(_kernel, problem, weight.shape),
        grid=(num_out // config.tile_out, max_tiles(num_rows, E, config.tile_rows)),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_out), x.dtype),
        compiler_params=plt.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
        name=name,
    )(tiles.group, tiles.start, tiles.end, x, weight.reshape(-1, num_in), *flat)


def _kernel(
    problem: _Problem,
    weight_shape: tuple[int, ...],
    group_ref: Any,
    start_ref: Any,
    end_ref: Any,
    x_ref: Any,
    weight_ref: Any,
    *refs: Any,
) -> None:
    E, parts, num_out, num_in = weight_shape
    config, optional, out_ref = problem.config, list(refs[:-1]), refs[-1]
    rows_ref = optional.pop(0) if problem.has_rows else None
    bias_ref = optional.pop(0) if problem.has_bias else None
    row_weights_ref = optional.pop(0) if problem.has_row_weights else None
    tile = pl.program_id(1)
    outs = pl.program_id(0) * config.tile_out + jnp.arange(config.tile_out)
    group = plt.load(group_ref.at[tile])

    @pl.when(group < E)
    def serve() -> None:
        rows = plt.load(start_ref.at[tile]) + jnp.arange(config.tile_rows)
        is_real = rows < plt.load(end_ref.at[tile])
        read = rows if rows_ref is None else plt.load(rows_ref.at[rows], mask=is_real, other=0)
        # Rows of the flat weight, and places in the flat bias.
        places = [(group * parts + part) * num_out + outs for part in range(parts)]
        products = _multiply(config, num_in, x_ref, weight_ref, read, is_real, places)
        if bias_ref is not None:
            biases = [plt.load(bias_ref.at[place]).astype(jnp.float32) for place in places]
            products = tuple(p + bias[None, :] for p, bias in zip(products, biases, strict=True))
        if problem.gating is not None:
            gate, up = products
            result = problem.gating(gate, up, activations=KERNEL_ACTIVATIONS)
        else:
            (result,) = products
        if row_weights_ref is not None:
            result = result * plt.load(row_weights_ref.at[rows], mask=is_real, other=0.0)[:, None]
        where = out_ref.at[rows[:, None], outs[None, :]]
        plt.store(where, result.astype(out_ref.dtype), mask=is_real[:, None])


def _multiply(
    config: GroupedConfig,
    num_in: int,
    x_ref: Any,
    weight_ref: Any,
    read: jax.Array,
    is_real: jax.Array,
    places: list[jax.Array],
) -> tuple[jax.Array, ...]:
    """Products of the tile's rows with one or two parts of the group's weight, in float32."""

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        k = (i * config.tile_in + jnp.arange(config.tile_in))[None, :]
        x = plt.load(x_ref.at[read[:, None], k], mask=is_real[:, None], other=0.0)
        return tuple(
            total
            + jnp.dot(
                x, plt.load(weight_ref.at[place[:, None], k]).T, preferred_element_type=jnp.float32
            )
            for total, place in zip(sums, places, strict=True)
        )

    zeros = jnp.zeros((config.tile_rows, config.tile_out), jnp.float32)
    products: tuple[jax.Array, ...] = lax.fori_loop(
        0, num_in // config.tile_in, step, (zeros,) * len(places)
    )
    return products
