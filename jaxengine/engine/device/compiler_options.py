"""What XLA is told about a program beside its operations. Figures are in benchmarks/LOG.md."""

CompilerOptions = dict[str, bool | str]

TRITON_GEMM_MAX_TOKENS = 32
# Trying out Triton's tiles keeps all cores busy for 4 s a program. More rows than these are content
# with one choice: by its products a step of 32 rows takes 0.4 % longer, one of 8 rows 3 %.
TRIED_TRITON_GEMM_MAX_TOKENS = 8
TRITON_GEMM = "block_n: 32 block_k: 128 split_k: 1 num_stages: 5 num_warps: 2 num_ctas: 1"
LARGE_STEP_TOKENS = 4096


def compiler_options(
    platform: str, num_tokens: int = 0, *, is_hopper: bool = False
) -> CompilerOptions:
    """Return XLA's options for a program.

    On a GPU most of the time goes into trying out kernels. What is left out of that:

    - variants of fused element-wise kernels and reductions, which are no faster,
    - the comparison of the results of matrix products, which are NVIDIA's (level 2 instead of 4),
    - products that XLA writes in Triton, but for few rows, where they are 4 to 8 % faster; on
      Hopper their tiles are tried out for the fewest rows alone.

    Args:
        platform: Of the devices, ``"gpu"`` or ``"cpu"``.
        num_tokens: Rows of the program's matrix products; 0 if it has none.
        is_hopper: Whether the GPU is one for which tiles have been measured.
    """
    if platform != "gpu":
        return {}
    options: CompilerOptions = {
        "xla_gpu_experimental_enable_fusion_autotuner": False,
        "xla_gpu_autotune_level": "2",
    }
    if num_tokens > TRITON_GEMM_MAX_TOKENS:
        options["xla_gpu_enable_triton_gemm"] = False
    elif num_tokens > TRIED_TRITON_GEMM_MAX_TOKENS and is_hopper:
        options["xla_gpu_override_gemm_autotuner"] = f"block_m: {max(16, num_tokens)} {TRITON_GEMM}"
    return options


def compiles_slowly(num_tokens: int) -> bool:
    """Whether XLA works on a GPU step of so many tokens for much longer than on most.

    In small steps it compares products written in Triton, in large ones each trial takes long.
    """
    return num_tokens <= TRITON_GEMM_MAX_TOKENS or num_tokens >= LARGE_STEP_TOKENS
