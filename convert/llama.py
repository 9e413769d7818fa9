"""Llama: the table the other families start from."""

from __future__ import annotations

from jaxengine.convert.rules import Config, Rule, Source, Table, same

# Caches of the rotary embedding that old versions of transformers saved.
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")

ATTENTION = "model.layers.{i}.self_attn"
MLP = "model.layers.{i}.mlp"


def rules(config: Config) -> Table:
    """The table for a LlamaForCausalLM config."""
    return table(
        config,
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
    )


def table(config: Config, attention_bias: bool, mlp_bias: bool = False) -> Table:
    """The table, with biases required where the config promises them, else taken if there.

    Args:
        config: Content of config.json.
        attention_bias: Whether q, k, v and o must have a bias.
        mlp_bias: Whether gate, up and down must have one.
    """
    D, V = config["hidden_size"], config["vocab_size"]
    H, G, K = head_sizes(config)
    N, F = K * G, config["intermediate_size"]
    rows = [
        same("embed_tokens.weight", "model.embed_tokens.weight", (V, D)),
        same("layers.{i}.input_norm.weight", "model.layers.{i}.input_layernorm.weight", (D,)),
        qkv(K, G, H, "weight", (D,)),
        qkv(K, G, H, "bias", (), optional=not attention_bias),
        Rule(
            "layers.{i}.attention.o_proj.weight",
            (Source(f"{ATTENTION}.o_proj.weight", (D, N * H), (D, N, H)),),
        ),
        same(
            "layers.{i}.attention.o_proj.bias",
            f"{ATTENTION}.o_proj.bias",
            (D,),
            optional=not attention_bias,
        ),
        same(
            "layers.{i}.post_attention_norm.weight",
            "model.layers.{i}.post_attention_layernorm.weight",
            (D,),
        ),
        gate_up(F, "weight", (D,)),
        gate_up(F, "bias", (), optional=not mlp_bias),
        same("layers.{i}.mlp.down_proj.weight", f"{MLP}.down_proj.weight", (D, F)),
        same("layers.{i}.mlp.down_proj.bias", f"{MLP}.down_proj.bias", (D,), optional=not mlp_bias),
        same("norm.weight", "model.norm.weight", (D,)),
    ]
    # A tied checkpoint may still carry the copy; it is the embedding and is dropped.
    tied = bool(config.get("tie_word_embeddings", False))
    if not tied:
        rows.append(same("lm_head.weight", "lm_head.weight", (V, D)))
    ignored = (*BUFFERS, "lm_head.weight") if tied else BUFFERS
    return Table(tuple(rows), config["num_hidden_layers"], ignored)


def head_sizes(config: Config) -> tuple[int, int, int]:
    """Head dimension H, query heads per KV head G, and KV heads K."""
    N = config["num_attention_heads"]
    K = config.get("num_key_value_heads") or N
    H = config.get("head_dim") or config["hidden_size"] // N
    if N % K:
        raise ValueError(f"config.json: {N} attention heads do not divide by {K} KV heads")
    return H, N // K, K


def qkv(K: int, G: int, H: int, kind: str, inner: tuple[int, ...], optional: bool = False) -> Rule:
    """The fused [K, G+2, H, ...]: to each KV head its G query heads, then its k, then its v."""

    def source(letter: str, heads: int) -> Source:
        name = f"{ATTENTION}.{letter}_proj.{kind}"
        return Source(name, (K * heads * H, *inner), (K, heads, H, *inner))

    sources = (source("q", G), source("k", 1), source("v", 1))
    return Rule(f"layers.{{i}}.attention.qkv_proj.{kind}", sources, axis=1, optional=optional)


def gate_up(F: int, kind: str, inner: tuple[int, ...], optional: bool = False) -> Rule:
    """The fused [2, F, ...]: gate, then up."""
    sources = tuple(
        Source(f"{MLP}.{name}_proj.{kind}", (F, *inner), (1, F, *inner)) for name in ("gate", "up")
    )
    return Rule(f"layers.{{i}}.mlp.gate_up_proj.{kind}", sources, optional=optional)
