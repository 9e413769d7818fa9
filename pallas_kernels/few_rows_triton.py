"""Matrix products of few rows in Pallas Triton, as halves of fused operations.

A decode step of few rows waits for the weights' bytes, and between its products for a dozen tiny
kernels a layer. So a product here leaves the last of its work to the kernel that reads it: its
inner dimension is cut into splits, which fill the GPU, and whoever takes the result adds them up
(``residual_norm``, ``rope_kv_write``). The first product of a feed-forward layer needs no such cut
and applies its activation at once, and its gate if there is one.

Grid (tiles of the output, splits): a program multiplies all rows, padded to the 16 that the tensor
cores want, with a stretch of ``tile_out`` rows of the weight.
Limits: bfloat16 or float16, up to 32 rows, dimensions that tiles divide; else NotImplementedError.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxengine.pallas_kernels.activations import KERNEL_ACTIVATIONS
from jaxengine.pallas_kernels.tiles import FEW_ROWS
from jaxtyping import Array, Float

MIN_ROWS_OF_DOT = 16


@dataclass(frozen=True)
class FewRowsConfig:
    """How a product is cut and pipelined.

    Attributes:
        tile_out: Rows of the weight that a program takes.
        tile_in: Length of a step of its loop.
        num_splits: Parts of the inner dimension.
        num_stages: Steps whose loads are under way.
    """

    tile_out: int = 32
    tile_in: int = 128
    num_splits: int = 1
    num_stages: int = 5
    num_warps: int = 2


# First the fastest on an H100 for the products of Llama-3.1-8B, whole and cut for two GPUs
# (benchmarks/LOG.md); the others for sizes that its tiles do not divide.
SPLIT_CONFIGS = (
    FewRowsConfig(num_splits=2),
    FewRowsConfig(tile_in=64, num_splits=2),
    FewRowsConfig(tile_in=64),
    FewRowsConfig(tile_out=16, tile_in=64),
)
GATED_CONFIGS = {
    16: (
        FewRowsConfig(tile_out=16, tile_in=256, num_stages=3),
        FewRowsConfig(tile_out=16, tile_in=64),
    ),
    32: (FewRowsConfig(tile_in=64, num_stages=3), FewRowsConfig(tile_out=16, tile_in=64)),
}


def split_product_triton(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"],
    *,
    config: FewRowsConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "splits T O"]:
    """Return ``x W^T`` as float32 parts, to be added up.

    Args:
        x: Rows.
        weight: [out, in].
        config: Tile sizes; None takes the measured ones.
        interpret: Run on the CPU, in Pallas' interpreter.

    Raises:
        NotImplementedError: If the dtype or a size is not served.
    """
    config = _choose(x, weight.shape[0], SPLIT_CONFIGS if config is None else (config,))
    return _launch_split(config, interpret, x, weight)


def gated_few_rows_triton(
    x: Float[Array, "T D"],
    weight: Float[Array, "2 F D"],
    bias: Float[Array, "2 F"] | None = None,
    *,
    activation: str,
    config: FewRowsConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "T F"]:
    """Return ``activation(x Wg^T + bg) * (x Wu^T + bu)``, computed in float32.

    Args:
        x: Rows.
        weight: Gate and up, [out, in] each.
        bias: Of both; None for none.
        activation: A key of ``ACTIVATIONS``.
        config: Tile sizes; None takes the measured ones.
        interpret: Run on the CPU, in Pallas' interpreter.

    Raises:
        ValueError: If the configuration cuts the inner dimension: nobody would add up the parts.
        NotImplementedError: If the dtype or a size is not served.
    """
    config = _choose_whole(x, weight.shape[1], config)
    return _launch_gated(config, activation, interpret, x, weight, bias)


def activated_few_rows_triton(
    x: Float[Array, "T D"],
    weight: Float[Array, "F D"],
    bias: Float[Array, " F"] | None = None,
    *,
    activation: str,
    config: FewRowsConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "T F"]:
    """Return ``activation(x W^T + b)``, computed in float32; the rest as the gated product."""
    config = _choose_whole(x, weight.shape[0], config)
    bias = None if bias is None else bias[None]
    return _launch_gated(config, activation, interpret, x, weight[None], bias)


def _choose_whole(x: jax.Array, num_out: int, config: FewRowsConfig | None) -> FewRowsConfig:
    if config is not None and config.num_splits != 1:
        raise ValueError(
            f"num_splits is {config.num_splits}, but the activation needs whole sums: use 1"
        )
    measured = GATED_CONFIGS[16 if x.shape[0] <= 16 else 32]
    return _choose(x, num_out, measured if config is None else (config,))


def _choose(x: jax.Array, num_out: int, configs: Sequence[FewRowsConfig]) -> FewRowsConfig:
    """Return the first whose tiles divide the product."""
    rows, num_in = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"few rows in Triton: {x.dtype}, not of 16 bits")
    if rows > FEW_ROWS:
        raise NotImplementedError(f"few rows in Triton: {rows} rows, more than {FEW_ROWS}")
    for config in configs:
        if num_out % config.tile_out == 0 and num_in % (config.num_splits * config.tile_in) == 0:
            return config
    raise NotImplementedError(f"few rows in Triton: no tiles divide [{num_out}, {num_in}]")


@functools.partial(jax.jit, static_argnums=(0, 1))  # jitted: lowered once for all layers
def _launch_split(
    config: FewRowsConfig, interpret: bool, x: jax.Array, weight: jax.Array
) -> jax.Array:
    return pl.pallas_call(
        functools.partial(_split_kernel, config),
        grid=(weight.shape[0] // config.tile_out, config.num_splits),
        out_shape=jax.ShapeDtypeStruct(
            (config.num_splits, x.shape[0], weight.shape[0]), jnp.float32
        ),
        compiler_params=_compiler_params(config),
        interpret=interpret,
        name="split_product",
    )(x, weight)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _launch_gated(
    config: FewRowsConfig,
    activation: str,
    interpret: bool,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    return pl.pallas_call(
        functools.partial(_gated_kernel, config, activation),
        grid=(weight.shape[1] // config.tile_out,),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), x.dtype),
        compiler_params=_compiler_params(config),
        interpret=interpret,
        name="gated_few_rows" if weight.shape[0] == 2 else "activated_few_rows",
    )(x, weight, bias)


def _compiler_params(config: FewRowsConfig) -> Any:
    return plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages)


def _split_kernel(config: FewRowsConfig, x_ref: Any, weight_ref: Any, out_ref: Any) -> None:
    rows, is_real, outs = _rows_and_outs(config, x_ref)
    split = pl.program_id(1)
    weights = [lambda k: weight_ref.at[outs[:, None], k]]
    (product,) = _multiply(config, x_ref, rows, is_real, weights, split)
    plt.store(out_ref.at[split, rows[:, None], outs[None, :]], product, mask=is_real[:, None])


def _gated_kernel(
    config: FewRowsConfig,
    activation: str,
    x_ref: Any,
    weight_ref: Any,
    bias_ref: Any,
    out_ref: Any,
) -> None:
    rows, is_real, outs = _rows_and_outs(config, x_ref)
    sides = range(weight_ref.shape[0])  # the gate and what it gates, or the gate alone
    weights = [lambda k, side=side: weight_ref.at[side, outs[:, None], k] for side in sides]
    products = _multiply(config, x_ref, rows, is_real, weights, 0)
    if bias_ref is not None:
        biases = [plt.load(bias_ref.at[side, outs]).astype(jnp.float32) for side in sides]
        products = tuple(p + bias[None, :] for p, bias in zip(products, biases, strict=True))
    gate, *up = products
    gated = KERNEL_ACTIVATIONS[activation](gate)
    gated = (gated * up[0] if up else gated).astype(out_ref.dtype)
    plt.store(out_ref.at[rows[:, None], outs[None, :]], gated, mask=is_real[:, None])


def _rows_and_outs(config: FewRowsConfig, x_ref: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Numbers of the rows, which of them are real, and the program's outputs."""
    rows = jnp.arange(max(MIN_ROWS_OF_DOT, pl.next_power_of_2(x_ref.shape[0])))
    outs = pl.program_id(0) * config.tile_out + jnp.arange(config.tile_out)
    return rows, rows < x_ref.shape[0], outs


def _multiply(
    config: FewRowsConfig,
    x_ref: Any,
    rows: jax.Array,
    is_real: jax.Array,
    weights: list[Any],
    split: jax.Array | int,
) -> tuple[jax.Array, ...]:
    """Products of all rows with rows of one or more weights, over one split."""
    per_split = x_ref.shape[1] // config.num_splits
    first = split * per_split

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        k = (first + i * config.tile_in + jnp.arange(config.tile_in))[None, :]
        x = plt.load(x_ref.at[rows[:, None], k], mask=is_real[:, None], other=0.0)
        return tuple(
            total + jnp.dot(x, plt.load(weight(k)).T, preferred_element_type=jnp.float32)
            for total, weight in zip(sums, weights, strict=True)
        )

    zeros = jnp.zeros((rows.shape[0], config.tile_out), jnp.float32)
    products: tuple[jax.Array, ...] = lax.fori_loop(
        0, per_split // config.tile_in, step, (zeros,) * len(weights)
    )
    return products
