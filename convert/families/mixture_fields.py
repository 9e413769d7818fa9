"""What the configs of mixtures have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxengine.convert.families import fields
from jaxengine.convert.families.fields import Config
from jaxengine.convert.model_spec import ExpertsSpec, ModelSpec, RouterSpec

MAX_EXPERTS = 4096


def mixture_spec(
    config: Config,
    *,
    router: RouterSpec,
    num_experts: int,
    num_chosen: int,
    width: str = "moe_intermediate_size",
) -> ExpertsSpec:
    """Return the mixture of a config, without anything that serves every token.

    Args:
        config: Content of config.json.
        router: How experts are chosen.
        num_experts: E where the config names none.
        num_chosen: Experts a token where the config names none.
        width: The field that has F.

    Raises:
        ValueError: If a field is missing or makes no sense, or tokens go to more experts than
            there are.
    """
    count = fields.integer(
        config,
        *("num_experts", "num_local_experts", "n_routed_experts"),
        default=num_experts,
        high=MAX_EXPERTS,
    )
    chosen = fields.integer(
        config,
        *("num_experts_per_tok", "experts_per_token"),
        default=num_chosen,
        high=MAX_EXPERTS,
    )
    if chosen > count:
        raise ValueError(
            f"config.json sends a token to {chosen} experts, but there are {count}: "
            f"num_experts_per_tok must be {count} at most"
        )
    activation = fields.text(config, "hidden_act", default="silu")
    return ExpertsSpec(count, chosen, fields.integer(config, width), activation, router)


def sparse_layers(config: Config) -> tuple[bool, ...]:
    """Which layers are mixtures, as Qwen's configs say it; the others are plain."""
    step = fields.integer(config, "decoder_sparse_step", default=1)
    plain = config.get("mlp_only_layers") or ()
    if not isinstance(plain, list | tuple):
        raise ValueError(f"config.json has mlp_only_layers={plain!r}: a list of layers is needed")
    return tuple(
        layer not in plain and (layer + 1) % step == 0 for layer in range(fields.num_layers(config))
    )


def with_mixtures(
    base: ModelSpec, mixture: ExpertsSpec, are_sparse: Sequence[bool] | None = None
) -> ModelSpec:
    """The same model with mixtures for feed-forward layers, in all or some of its layers."""
    chosen = (True,) * base.num_layers if are_sparse is None else are_sparse
    layers = (
        replace(layer, feed_forward=mixture) if is_sparse else layer
        for layer, is_sparse in zip(base.layers, chosen, strict=True)
    )
    return replace(base, layers=tuple(layers))
