"""What models whose layers are all alike have in common."""

from __future__ import annotations

from typing import Any

from jaxengine.convert.families import fields
from jaxengine.convert.families.fields import Config
from jaxengine.convert.families.rope import stretched_length
from jaxengine.convert.model_spec import FeedForwardSpec, LayerSpec, ModelSpec, NormSpec


def uniform_spec(
    config: Config,
    layer: LayerSpec,
    *,
    final_norm: NormSpec | None,
    length: int | None = None,
    **differences: Any,
) -> ModelSpec:
    """Return the spec of a model whose layers are alike, under any of the usual names of fields.

    Args:
        config: Content of config.json.
        layer: Each of its layers.
        final_norm: Behind the last one.
        length: The longest sequence, before scaling; None for the config's.
        differences: Other fields of ``ModelSpec``.
    """
    if length is None:
        length = fields.max_positions(config, "max_position_embeddings", "n_positions", "n_ctx")
    spec = {
        "architecture": config["architectures"][0],
        "vocab_size": fields.vocab_size(config),
        "hidden_size": fields.integer(config, "hidden_size", "n_embd", "n_embed", "d_model"),
        "max_position_embeddings": stretched_length(config, length),
        "layers": (layer,)
        * fields.num_layers(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        "final_norm": final_norm,
    }
    return ModelSpec(**{**spec, **differences})


def layer_norm(config: Config, *names: str, has_bias: bool = True) -> NormSpec:
    """A LayerNorm whose eps has one of some names, by default 1e-5."""
    eps = fields.number(config, *names, default=1e-5, low=0.0)
    return NormSpec("layer", eps, has_bias=has_bias)


def ungated(width: int, activation: str, *, bias: bool = True) -> FeedForwardSpec:
    """A feed-forward layer of two matrices."""
    return FeedForwardSpec(width, activation, is_gated=False, up_bias=bias, down_bias=bias)
