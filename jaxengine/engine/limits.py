"""How much an engine takes at a time: what the user left open, decided from model and device."""

import dataclasses

import jax

from jaxengine.config import EngineConfig
from jaxengine.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Limits:
    """What EngineConfig leaves open, decided from model and device."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    min_mixed_tokens: int
    min_decode_rows: int
    compiles_at_start: bool


def resolve_limits(config: EngineConfig, model: ModelConfig, device: jax.Device) -> Limits:
    """Fill in the limits that the user left open, as vLLM does.

    Raises:
        ValueError: If ``max_model_len`` is more than the model was made for.
    """
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        can_scale = model.rope is not None and model.rope.rope_type == "default"
        remedy = ", or set rope_scaling with --hf-overrides" if can_scale else ""
        raise ValueError(
            f"max_model_len {max_model_len} is more than the {model.max_position_embeddings} "
            f"positions that the model was made for: lower it{remedy}"
        )
    is_cpu = device.platform == "cpu"
    is_hopper = any(name in device.device_kind for name in ("H100", "H200", "B200", "GH200"))
    # A CPU gains nothing from longer steps than 512, and padding them costs it real time.
    tokens, seqs = (16384, 1024) if is_hopper else (512, 256) if is_cpu else (8192, 256)
    max_num_seqs = config.max_num_seqs or min(seqs, config.max_num_batched_tokens or seqs)
    budget = config.max_num_batched_tokens or max(tokens, max_num_seqs)
    if budget < max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens {budget} is less than max_num_seqs {max_num_seqs}: every "
            "running request needs one token a step"
        )
    if not config.enable_chunked_prefill:
        budget = max(budget, max_model_len)
    return Limits(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        min_mixed_tokens=min(16 if is_cpu else 64, budget),
        min_decode_rows=1 if is_cpu else 8,
        compiles_at_start=not (is_cpu or config.enforce_eager),
    )
