"""Which kernel serves which shape on which device: a table, so that a refusal too many is seen.

Programs are traced only; that the kernels lower and what they compute have tests of their own.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxengine.pallas_kernels.gated_product import activated_product, gated_product
from jaxengine.pallas_kernels.operands import Addends, AttentionOptions, Norm
from jaxengine.pallas_kernels.packed_attention import packed_attention
from jaxengine.pallas_kernels.paged_attention import paged_attention
from jaxengine.pallas_kernels.residual_norm import residual_norm
from jaxengine.pallas_kernels.rope_kv_write import rope_kv_write
from jaxengine.pallas_kernels.split_product import split_product
from jaxengine.pallas_kernels.target import Target

CPU, H100, A100 = Target("cpu"), Target("gpu", "hopper", 132), Target("gpu", "ampere", 108)
PLAIN = Target("gpu", "hopper", 132, implementation="reference")
BF16 = "bfloat16"
KERNELS = (
    *("paged_decode", "ragged_attention_triton", "ragged_attention_mosaic", "packed_attention"),
    *("gated_few_rows", "activated_few_rows", "gated_product_mosaic", "split_product"),
    *("residual_norm", "rope_kv_write"),
)
HAS_MOSAIC = hasattr(plgpu, "InterpretGPUParams")


def served_by(function: Callable[..., Any], *shapes: Any) -> set[str]:
    """The kernels in a function's trace."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    sharded = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    jaxpr = str(jax.make_jaxpr(sharded)(*shapes))
    return set(re.findall(rf"\b(?:name|kernel_name)=({'|'.join(KERNELS)})\b", jaxpr)) | {
        name for name in KERNELS if f"name_and_src_info={name} " in jaxpr
    }


def expected(kernels: str, on_old_jax: str | None = None) -> set[str]:
    """Of a table's cell: names with spaces in between, and others where Mosaic's are missing."""
    return set((kernels if HAS_MOSAIC or on_old_jax is None else on_old_jax).split())


def array(*dims: int, dtype: str = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize(
    ("target", "num_rows", "dims", "activation", "dtype", "kernels", "on_old_jax"),
    [
        (H100, 8, (14336, 4096), "silu", BF16, "gated_few_rows", None),
        (H100, 32, (9216, 2304), "gelu_pytorch_tanh", BF16, "gated_few_rows", None),
        (H100, 1, (6912, 1152), "gelu", "float16", "gated_few_rows", None),
        (A100, 8, (14336, 4096), "silu", BF16, "gated_few_rows", None),
        (H100, 64, (14336, 4096), "silu", BF16, "", None),
        (H100, 256, (14336, 4096), "silu", BF16, "gated_product_mosaic", ""),
        (H100, 16384, (3072, 1024), "silu", BF16, "gated_product_mosaic", ""),
        (A100, 256, (14336, 4096), "silu", BF16, "", None),
        (H100, 8, (14336, 4096), "silu", "float32", "", None),
        (CPU, 8, (14336, 4096), "silu", BF16, "", None),
        (PLAIN, 8, (14336, 4096), "silu", BF16, "", None),
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_gated_products(
    target: Target,
    num_rows: int,
    dims: tuple[int, int],
    activation: str,
    dtype: str,
    kernels: str,
    on_old_jax: str | None,
    has_bias: bool,
) -> None:
    def run(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        return gated_product(x, weight, bias=bias, activation=activation, target=target)

    bias = array(2, dims[0], dtype=dtype) if has_bias else None
    shapes = array(num_rows, dims[1], dtype=dtype), array(2, *dims, dtype=dtype), bias
    assert served_by(run, *shapes) == expected(kernels, on_old_jax)


@pytest.mark.parametrize(
    ("target", "num_rows", "dims", "kernels"),
    [
        (H100, 1, (3072, 768), "activated_few_rows"),  # GPT-2
        (H100, 32, (10240, 2560), "activated_few_rows"),  # Phi-2
        (H100, 8, (18176, 4544), "activated_few_rows"),  # Falcon 7B
        (H100, 33, (3072, 768), ""),
        (H100, 512, (3072, 768), ""),
        (H100, 8, (3070, 768), ""),
        (CPU, 1, (3072, 768), ""),
    ],
)
def test_products_without_a_gate(
    target: Target, num_rows: int, dims: tuple[int, int], kernels: str
) -> None:
    def run(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return activated_product(x, weight, bias=bias, activation="gelu_new", target=target)

    shapes = array(num_rows, dims[1]), array(*dims), array(dims[0])
    assert served_by(run, *shapes) == expected(kernels)


@pytest.mark.parametrize(
    ("target", "num_rows", "kernels"),
    [(H100, 8, "split_product"), (A100, 32, "split_product"), (H100, 33, ""), (CPU, 8, "")],
)
@pytest.mark.parametrize("dims", [(6144, 4096), (2304, 768), (960, 576), (4544, 4544)])
def test_products_in_parts(
    target: Target, num_rows: int, kernels: str, dims: tuple[int, int]
) -> None:
    def run(x: jax.Array, weight: jax.Array) -> jax.Array:
        return split_product(x, weight, target=target)

    assert served_by(run, array(num_rows, dims[1]), array(*dims)) == expected(kernels)


@pytest.mark.parametrize(
    ("target", "num_rows", "kernels"),
    [(H100, 1, "residual_norm"), (A100, 32, "residual_norm"), (H100, 33, ""), (CPU, 1, "")],
)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("num_norms", [1, 2])
def test_sums_and_norms(
    target: Target, num_rows: int, kernels: str, kind: str, num_norms: int
) -> None:
    def run(part: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
        norm = Norm(weight, weight if kind == "layer" else None, kind=kind)
        return residual_norm(
            Addends((part, part), weight),
            residual,
            (norm,) * num_norms,
            inner=norm,
            scale=0.5,
            peers=None,
            axis_name="tp",
            target=target,
        )

    shapes = array(2, num_rows, 2560, dtype="float32"), array(num_rows, 2560), array(2560)
    assert served_by(run, *shapes) == expected(kernels)


@pytest.mark.parametrize("rotary_dim", [0, 20, 32, 80])
@pytest.mark.parametrize(
    ("target", "dtype", "kernels"),
    [
        (H100, BF16, "rope_kv_write"),
        (A100, "float16", "rope_kv_write"),
        (H100, "float32", ""),
        (CPU, BF16, ""),
    ],
)
def test_rotations_and_cache_writes(
    target: Target, dtype: str, kernels: str, rotary_dim: int
) -> None:
    T, K, G, H = 300, 2, 3, 80

    def run(
        part: jax.Array,
        bias: jax.Array,
        angles: jax.Array,
        slots: jax.Array,
        cache: jax.Array,
        weight: jax.Array,
    ) -> Any:
        return rope_kv_write(
            Addends((part,), bias),
            (angles, angles) if rotary_dim else None,
            *(slots, cache, cache),
            q_norm=Norm(weight, kind="layer"),
            k_norm=Norm(weight[:K], kind="layer"),
            dtype=dtype,
            target=target,
        )

    cache = array(9, K, 16, H, dtype=dtype)
    shapes = (
        array(1, T, K, G + 2, H, dtype=dtype),
        array(K, G + 2, H, dtype=dtype),
        array(T, rotary_dim // 2, dtype="float32"),
        array(T, dtype="int32"),
        cache,
        array(K * G, H, dtype=dtype),
    )
    assert served_by(run, *shapes) == expected(kernels)


def attention_program(
    target: Target, head_dim: int, group: int, num_tokens: int, dtype: str, implementation: Any
) -> set[str]:
    K, B, decode_only = 2, 8, num_tokens == 8
    options = AttentionOptions(0.1, sliding_window=100, logits_soft_cap=30.0)

    def run(q: jax.Array, cache: jax.Array, per_head: jax.Array, *ints: jax.Array) -> jax.Array:
        return paged_attention(
            *(q, cache, cache, *ints),
            options=options,
            alibi_slopes=per_head,
            sinks=per_head,
            decode_only=decode_only,
            target=target,
            implementation=implementation,
        )

    return served_by(
        run,
        array(num_tokens, K * group, head_dim, dtype=dtype),
        array(9, K, 16, head_dim, dtype=dtype),
        array(K * group, dtype="float32"),
        *(array(*dims, dtype="int32") for dims in ((B, 4), (B,), (B + 1,), ())),
    )


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 71, 128])
def test_attention_of_every_head_dim_and_group_is_tritons_on_every_gpu(
    head_dim: int, group: int
) -> None:
    for target in (H100, A100):
        assert attention_program(target, head_dim, group, 8, BF16, None) == {"paged_decode"}
        mixed = attention_program(target, head_dim, group, 64, BF16, None)
        assert mixed == {"paged_decode", "ragged_attention_triton"}


@pytest.mark.parametrize(
    ("target", "head_dim", "num_tokens", "dtype", "implementation", "kernels", "on_old_jax"),
    [
        (H100, 128, 4096, BF16, None, "paged_decode ragged_attention_mosaic",
         "paged_decode ragged_attention_triton"),
        (H100, 80, 4096, BF16, None, "paged_decode ragged_attention_triton", None),
        (A100, 128, 4096, BF16, None, "paged_decode ragged_attention_triton", None),
        (H100, 128, 8, BF16, "mosaic", "paged_decode", None),
        (H100, 128, 64, BF16, "xla", "", None),
        (H100, 128, 64, "float32", None, "", None),
        (H100, 320, 64, BF16, None, "", None),
        (PLAIN, 128, 64, BF16, None, "", None),
        (CPU, 128, 64, BF16, None, "", None),
    ],
)  # fmt: skip
def test_attention(
    target: Target,
    head_dim: int,
    num_tokens: int,
    dtype: str,
    implementation: str | None,
    kernels: str,
    on_old_jax: str | None,
) -> None:
    found = attention_program(target, head_dim, 4, num_tokens, dtype, implementation)
    assert found == expected(kernels, on_old_jax)


@pytest.mark.parametrize(
    ("target", "head_dim", "kernels"),
    [
        (H100, 32, "packed_attention"),
        (A100, 64, "packed_attention"),
        (H100, 80, "packed_attention"),
        (H100, 128, "packed_attention"),
        (H100, 256, ""),
        (CPU, 64, ""),
        (PLAIN, 64, ""),
    ],
)
def test_attention_without_a_cache(target: Target, head_dim: int, kernels: str) -> None:
    def run(q: jax.Array, k: jax.Array, starts: jax.Array) -> jax.Array:
        return packed_attention(q, k, k, starts, options=AttentionOptions(1.0), target=target)

    q = array(256, 12, head_dim)
    assert served_by(run, q, q, array(9, dtype="int32")) == expected(kernels)


@pytest.mark.parametrize(
    ("name", "capability", "generation"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", "hopper"),
        ("NVIDIA H100", None, "hopper"),
        ("NVIDIA GH200 480GB", None, "hopper"),
        ("NVIDIA H800", None, "hopper"),
        ("NVIDIA GB200", None, "blackwell"),
        ("NVIDIA B200", "10.0", "blackwell"),
        ("NVIDIA RTX PRO 6000", "12.0", "blackwell"),
        ("NVIDIA L4", "8.9", "ada"),
        ("NVIDIA A100-SXM4-80GB", None, "ampere"),
        ("NVIDIA A10G", "8.6", "ampere"),
        ("Tesla T4", "7.5", "turing"),
        ("AMD Instinct MI300X", "gfx942", None),
    ],
)
def test_a_gpus_generation_is_known(
    name: str, capability: str | None, generation: str | None
) -> None:
    class Device:
        platform, device_kind, core_count = "gpu", name, 7
        compute_capability = capability

    if capability is None:
        del Device.compute_capability
    target = Target.of(Device())
    assert target == Target("gpu", generation, num_sms=7)
    assert target.is_hopper == (generation == "hopper")


def test_a_cpu_and_an_abstract_gpu_are_targets_too() -> None:
    assert Target.of(jax.devices("cpu")[0]) == CPU
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    assert Target.of(device) == H100


def test_an_implementation_that_not_all_ops_have_is_refused() -> None:
    with pytest.raises(ValueError, match="'mosaic' is not one that all ops have"):
        Target("gpu", implementation="mosaic")
