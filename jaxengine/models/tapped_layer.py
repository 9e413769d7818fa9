"""A decoder layer that is looked into: its own parts, with every sum taken where it is due.

``DecoderLayer`` leaves a sum to the norm that follows it, so that a kernel does both; then what a
part adds is nowhere an array. Here it is one. The equations are those of
``convert/model_spec.py``.
"""

import jax.numpy as jnp

from jaxengine.batch import InputBatch
from jaxengine.layers.attention import CosSin, KVPair
from jaxengine.layers.norm import Norm, join
from jaxengine.models.decoder_layer import DecoderLayer, Rows
from jaxengine.pallas_kernels.operands import Addends
from jaxengine.taps import Taps


def run_tapped_layer(
    layer: DecoderLayer,
    x: Rows,
    batch: InputBatch,
    cos_sin: CosSin | None,
    caches: KVPair | None,
    taps: Taps,
) -> tuple[Rows, KVPair | None]:
    """Run a layer, and pass its points.

    Args:
        layer: The layer.
        x: The residual stream.
        batch: The step; of every token the output is wanted, and XLA adds up over shards.
        cos_sin: Of the tokens' angles; None without rotation.
        caches: The layer's keys and values; None if it has no attention.
        taps: Of the layer.

    Returns:
        The stream behind the layer, and its caches.
    """
    wiring, scale = layer.spec.wiring, layer.spec.residual_scale
    is_post = wiring == "post"

    def added(addends: Addends, inner: Norm | None) -> Rows:
        nothing = jnp.zeros_like(x)
        total, _ = join(addends, nothing, (), inner=inner, scale=scale, target=layer.target)
        return total

    x = taps("input", x)
    start = x
    if layer.attention is not None and caches is not None:
        norm = None if is_post else layer.input_norm
        read = taps("attention.input", x if norm is None else norm(x))
        within = taps.within("attention")
        attended, caches = layer.attention(read, batch, cos_sin, caches, within)
        own = added(attended, None if is_post else layer.attention_out_norm)
        x = x + taps("attention.added", own)
        if is_post and layer.input_norm is not None:
            x = layer.input_norm(x)
        if wiring != "parallel":
            x = taps("middle", x)
    if layer.mlp is not None:
        source, norm = x, layer.post_attention_norm
        if wiring == "parallel":
            source, norm = start, norm or layer.input_norm
        read = source if norm is None or is_post else norm(source)
        due = layer.fed_forward(taps("mlp.input", read), batch)
        assert due is not None, "a layer with a feed-forward part leaves its sum due"
        x = x + taps("mlp.added", added(due, None if is_post else layer.mlp_out_norm))
        if is_post and norm is not None:
            x = norm(x)
    return taps("output", x), caches
