"""Families that transformers has no class for, written from their published descriptions in numpy.

Slow and obvious: one sequence, no cache. A model is its checkpoint's names and shapes, and a
forward pass over such tensors; it shares nothing with the engine.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray
Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight + bias


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def angles(num_tokens: int, dim: int, theta: float) -> Array:
    return np.arange(num_tokens)[:, None] / theta ** (np.arange(0, dim, 2) / dim)


def turn_halves(x: Array, theta: float = 10000.0) -> Array:
    """x [T, heads, H]: dimension j turns with j + H / 2."""
    angle = angles(len(x), x.shape[2], theta)[:, None]
    first, second = np.split(x, 2, axis=2)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)


def turn_neighbours(x: Array, dim: int, theta: float = 10000.0) -> Array:
    """x [T, heads, H]: of the first ``dim`` dimensions each even one turns with the next."""
    turns = np.exp(1j * angles(len(x), dim, theta))[:, None]
    pairs = (x[..., 0:dim:2] + 1j * x[..., 1:dim:2]) * turns
    turned = np.stack([pairs.real, pairs.imag], axis=-1).reshape(*x.shape[:2], dim)
    return np.concatenate([turned, x[..., dim:]], axis=2)


def attend(q: Array, k: Array, v: Array, slopes: Array | None = None) -> Array:
    """Causal attention of q [T, N, H] over k and v [T, K, H], as [T, N * H]."""
    T, N, H = q.shape
    k, v = (np.repeat(a, N // a.shape[1], axis=1) for a in (k, v))
    scores = np.einsum("inh,jnh->nij", q, k) / np.sqrt(H)
    distance = np.arange(T)[None, :] - np.arange(T)[:, None]
    if slopes is not None:
        scores = scores + slopes[:, None, None] * distance
    scores = np.where(distance <= 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nij,jnh->inh", weights, v).reshape(T, N * H)


@dataclass(frozen=True)
class NumpyModel:
    """A family: shapes of a config's checkpoint, and logits [T, V] of token ids."""

    shapes: Callable[[Config], Shapes]
    logits: Callable[[Config, dict[str, Array], list[int]], Array]


def _in_layers(num_layers: int, prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{name}": s for i in range(num_layers) for name, s in shapes.items()}


def _llama_shapes(c: Config, *, biases: tuple[str, ...] = (), norm_bias: bool = False) -> Shapes:
    """Llama's names; ``biases`` are those projections that have one."""
    D, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    N, K = c["num_attention_heads"], c.get("num_key_value_heads", c["num_attention_heads"])
    H = D // N
    layer = {
        "self_attn.q_proj.weight": (N * H, D),
        "self_attn.k_proj.weight": (K * H, D),
        "self_attn.v_proj.weight": (K * H, D),
        "self_attn.o_proj.weight": (D, N * H),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    for name in biases:
        layer[f"self_attn.{name}.bias"] = layer[f"self_attn.{name}.weight"][:1]
    whole = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    if norm_bias:
        layer |= {"input_layernorm.bias": (D,), "post_attention_layernorm.bias": (D,)}
        whole["model.norm.bias"] = (D,)
    return whole | _in_layers(c["num_hidden_layers"], "model.layers", layer)


def _llama_logits(c: Config, w: dict[str, Array], tokens: list[int]) -> Array:
    """Llama with the biases that the tensors have, and MiniCPM's scales if the config has them."""
    N, L = c["num_attention_heads"], c["num_hidden_layers"]
    H, T = c["hidden_size"] // N, len(tokens)

    def norm(x: Array, name: str) -> Array:
        if f"{name}.bias" in w:
            return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], c["rms_norm_eps"])
        return rms_norm(x, w[f"{name}.weight"], c["rms_norm_eps"])

    def linear(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    residual = c["scale_depth"] / np.sqrt(L) if "scale_depth" in c else 1.0
    x = w["model.embed_tokens.weight"][tokens] * c.get("scale_emb", 1.0)
    for i in range(L):
        p = f"model.layers.{i}"
        y = norm(x, f"{p}.input_layernorm")
        q, k, v = (linear(y, f"{p}.self_attn.{n}_proj").reshape(T, -1, H) for n in "qkv")
        y = attend(turn_halves(q), turn_halves(k), v)
        x = x + residual * linear(y, f"{p}.self_attn.o_proj")
        y = norm(x, f"{p}.post_attention_layernorm")
        y = silu(linear(y, f"{p}.mlp.gate_proj")) * linear(y, f"{p}.mlp.up_proj")
        x = x + residual * linear(y, f"{p}.mlp.down_proj")
    x = norm(x, "model.norm") * c.get("dim_model_base", c["hidden_size"]) / c["hidden_size"]
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def _minicpm_shapes(c: Config) -> Shapes:
    return {name: s for name, s in _llama_shapes(c).items() if name != "lm_head.weight"}


def _yi_shapes(c: Config) -> Shapes:
    return {_yi_name(name): shape for name, shape in _llama_shapes(c).items()}


def _yi_name(name: str) -> str:
    return name.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2")


def _yi_logits(c: Config, w: dict[str, Array], tokens: list[int]) -> Array:
    return _llama_logits(c, {n: w[_yi_name(n)] for n in _llama_shapes(c)}, tokens)


def _internlm2_shapes(c: Config) -> Shapes:
    D, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    N, K = c["num_attention_heads"], c["num_key_value_heads"]
    layer = {
        "attention.wqkv.weight": ((N + 2 * K) * (D // N), D),
        "attention.wo.weight": (D, D),
        "attention_norm.weight": (D,),
        "ffn_norm.weight": (D,),
        "feed_forward.w1.weight": (F, D),
        "feed_forward.w2.weight": (D, F),
        "feed_forward.w3.weight": (F, D),
    }
    whole: Shapes = {
        "model.tok_embeddings.weight": (V, D),
        "model.norm.weight": (D,),
        "output.weight": (V, D),
    }
    return whole | _in_layers(c["num_hidden_layers"], "model.layers", layer)


def _internlm2_logits(c: Config, w: dict[str, Array], tokens: list[int]) -> Array:
    T, K, eps = len(tokens), c["num_key_value_heads"], c["rms_norm_eps"]
    H = c["hidden_size"] // c["num_attention_heads"]
    x = w["model.tok_embeddings.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        y = rms_norm(x, w[f"{p}.attention_norm.weight"], eps)
        groups = (y @ w[f"{p}.attention.wqkv.weight"].T).reshape(T, K, -1, H)
        q = groups[:, :, :-2].reshape(T, -1, H)
        theta = c["rope_theta"]
        y = attend(turn_halves(q, theta), turn_halves(groups[:, :, -2], theta), groups[:, :, -1])
        x = x + y @ w[f"{p}.attention.wo.weight"].T
        y = rms_norm(x, w[f"{p}.ffn_norm.weight"], eps)
        gate, down, up = (w[f"{p}.feed_forward.w{n}.weight"].T for n in (1, 2, 3))
        x = x + (silu(y @ gate) * (y @ up)) @ down
    return rms_norm(x, w["model.norm.weight"], eps) @ w["output.weight"].T


def _chatglm_shapes(c: Config) -> Shapes:
    D, F, V = c["hidden_size"], c["ffn_hidden_size"], c["padded_vocab_size"]
    H, N, K = c["kv_channels"], c["num_attention_heads"], c["multi_query_group_num"]
    layer = {
        "input_layernorm.weight": (D,),
        "self_attention.query_key_value.weight": ((N + 2 * K) * H, D),
        "self_attention.query_key_value.bias": ((N + 2 * K) * H,),
        "self_attention.dense.weight": (D, N * H),
        "post_attention_layernorm.weight": (D,),
        "mlp.dense_h_to_4h.weight": (2 * F, D),
        "mlp.dense_4h_to_h.weight": (D, F),
    }
    whole: Shapes = {
        "transformer.embedding.word_embeddings.weight": (V, D),
        "transformer.encoder.final_layernorm.weight": (D,),
        "transformer.output_layer.weight": (V, D),
        "transformer.rotary_pos_emb.inv_freq": (H // 4,),
    }
    return whole | _in_layers(c["num_layers"], "transformer.encoder.layers", layer)


def _chatglm_logits(c: Config, w: dict[str, Array], tokens: list[int]) -> Array:
    T, H, eps = len(tokens), c["kv_channels"], c["layernorm_epsilon"]
    N, K = c["num_attention_heads"], c["multi_query_group_num"]
    x = w["transformer.embedding.word_embeddings.weight"][tokens]
    for i in range(c["num_layers"]):
        p = f"transformer.encoder.layers.{i}"
        y = rms_norm(x, w[f"{p}.input_layernorm.weight"], eps)
        y = y @ w[f"{p}.self_attention.query_key_value.weight"].T
        y = (y + w[f"{p}.self_attention.query_key_value.bias"]).reshape(T, N + 2 * K, H)
        q, k, v = y[:, :N], y[:, N : N + K], y[:, N + K :]
        theta = 10000.0 * c.get("rope_ratio", 1)
        y = attend(turn_neighbours(q, H // 2, theta), turn_neighbours(k, H // 2, theta), v)
        x = x + y @ w[f"{p}.self_attention.dense.weight"].T
        y = rms_norm(x, w[f"{p}.post_attention_layernorm.weight"], eps)
        gate, up = np.split(y @ w[f"{p}.mlp.dense_h_to_4h.weight"].T, 2, axis=1)
        x = x + (silu(gate) * up) @ w[f"{p}.mlp.dense_4h_to_h.weight"].T
    x = rms_norm(x, w["transformer.encoder.final_layernorm.weight"], eps)
    return x @ w["transformer.output_layer.weight"].T


def _baichuan_shapes(c: Config) -> Shapes:
    D, shapes = c["hidden_size"], _llama_shapes(c)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}.self_attn"
        for letter in "qkv":
            del shapes[f"{p}.{letter}_proj.weight"]
        shapes[f"{p}.W_pack.weight"] = (3 * D, D)
    return shapes


def _baichuan_logits(c: Config, w: dict[str, Array], tokens: list[int]) -> Array:
    T, N, eps = len(tokens), c["num_attention_heads"], c["rms_norm_eps"]
    slopes = None if "max_position_embeddings" in c else 2.0 ** (-8 * np.arange(1, N + 1) / N)
    assert slopes is None or N & (N - 1) == 0, "the slopes are those of a power of two"
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        y = rms_norm(x, w[f"{p}.input_layernorm.weight"], eps)
        q, k, v = np.split((y @ w[f"{p}.self_attn.W_pack.weight"].T).reshape(T, 3 * N, -1), 3, 1)
        if slopes is None:
            q, k = turn_halves(q), turn_halves(k)
        x = x + attend(q, k, v, slopes) @ w[f"{p}.self_attn.o_proj.weight"].T
        y = rms_norm(x, w[f"{p}.post_attention_layernorm.weight"], eps)
        gate, up, down = (w[f"{p}.mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
        x = x + (silu(y @ gate) * (y @ up)) @ down
    head = w["lm_head.weight"]
    if "z_loss_weight" in c:
        head = head / np.linalg.norm(head, axis=1, keepdims=True)
    return rms_norm(x, w["model.norm.weight"], eps) @ head.T


def _qwen_shapes(c: Config) -> Shapes:
    D, F, V = c["hidden_size"], c["intermediate_size"] // 2, c["vocab_size"]
    P = c["num_attention_heads"] * c["kv_channels"]
    layer = {
        "ln_1.weight": (D,),
        "attn.c_attn.weight": (3 * P, D),
        "attn.c_attn.bias": (3 * P,),
        "attn.c_proj.weight": (D, P),
        "ln_2.weight": (D,),
        "mlp.w1.weight": (F, D),
        "mlp.w2.weight": (F, D),
        "mlp.c_proj.weight": (D, F),
    }
    whole: Shapes = {
        "transformer.wte.weight": (V, D),
        "transformer.ln_f.weight": (D,),
        "lm_head.weight": (V, D),
    }
    return whole | _in_layers(c["num_hidden_layers"], "transformer.h", layer)


def _qwen_logits(c: Config, w: dict[str, Array], tokens: list[int]) -> Array:
    T, N, eps = len(tokens), c["num_attention_heads"], c["layer_norm_epsilon"]
    x = w["transformer.wte.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        p = f"transformer.h.{i}"
        y = rms_norm(x, w[f"{p}.ln_1.weight"], eps)
        y = y @ w[f"{p}.attn.c_attn.weight"].T + w[f"{p}.attn.c_attn.bias"]
        q, k, v = np.split(y.reshape(T, 3 * N, -1), 3, axis=1)
        base = c["rotary_emb_base"]
        y = attend(turn_halves(q, base), turn_halves(k, base), v)
        x = x + y @ w[f"{p}.attn.c_proj.weight"].T
        y = rms_norm(x, w[f"{p}.ln_2.weight"], eps)
        y = (y @ w[f"{p}.mlp.w1.weight"].T) * silu(y @ w[f"{p}.mlp.w2.weight"].T)
        x = x + y @ w[f"{p}.mlp.c_proj.weight"].T
    return rms_norm(x, w["transformer.ln_f.weight"], eps) @ w["lm_head.weight"].T


_EXAONE_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "model.layers": "transformer.h",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.attention.out_proj",
    "self_attn": "attn.attention",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
}


def _exaone_name(name: str) -> str:
    for theirs, exaones in _EXAONE_NAMES.items():
        name = name.replace(theirs, exaones)
    return name


def _exaone_as_llama(c: Config) -> Config:
    names = {"num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon"}
    return {**c, **{llamas: c[own] for llamas, own in names.items()}}


def _exaone_shapes(c: Config) -> Shapes:
    return {_exaone_name(n): s for n, s in _llama_shapes(_exaone_as_llama(c)).items()}


def _exaone_logits(c: Config, w: dict[str, Array], tokens: list[int]) -> Array:
    c = _exaone_as_llama(c)
    return _llama_logits(c, {n: w[_exaone_name(n)] for n in _llama_shapes(c)}, tokens)


def _telechat_shapes(c: Config) -> Shapes:
    D, F, V = c["hidden_size"], c["ffn_hidden_size"], c["vocab_size"]
    layer = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attention.query.weight": (D, D),
        "self_attention.key_value.weight": (2 * D, D),
        "self_attention.dense.weight": (D, D),
        "self_attention.dense.bias": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "mlp.down_proj.bias": (D,),
    }
    whole: Shapes = {
        "transformer.word_embeddings.weight": (V, D),
        "transformer.ln_f.weight": (D,),
        "lm_head.weight": (V, D),
    }
    return whole | _in_layers(c["n_layer"], "transformer.h", layer)


def _telechat_logits(c: Config, w: dict[str, Array], tokens: list[int]) -> Array:
    T, N, eps = len(tokens), c["n_head"], c["layer_norm_epsilon"]
    x = w["transformer.word_embeddings.weight"][tokens]
    for i in range(c["n_layer"]):
        p = f"transformer.h.{i}"
        y = rms_norm(x, w[f"{p}.input_layernorm.weight"], eps)
        q = (y @ w[f"{p}.self_attention.query.weight"].T).reshape(T, N, -1)
        kv = (y @ w[f"{p}.self_attention.key_value.weight"].T).reshape(T, N, 2, -1)
        y = attend(turn_halves(q), turn_halves(kv[:, :, 0]), kv[:, :, 1])
        y = y @ w[f"{p}.self_attention.dense.weight"].T + w[f"{p}.self_attention.dense.bias"]
        x = x + y
        y = rms_norm(x, w[f"{p}.post_attention_layernorm.weight"], eps)
        y = silu(y @ w[f"{p}.mlp.gate_proj.weight"].T) * (y @ w[f"{p}.mlp.up_proj.weight"].T)
        x = x + y @ w[f"{p}.mlp.down_proj.weight"].T + w[f"{p}.mlp.down_proj.bias"]
    return rms_norm(x, w["transformer.ln_f.weight"], eps) @ w["lm_head.weight"].T


def _internlm_shapes(c: Config) -> Shapes:
    return _llama_shapes(c, biases=("q_proj", "k_proj", "v_proj", "o_proj"))


def _internlm3_shapes(c: Config) -> Shapes:
    return _llama_shapes(c, biases=("q_proj", "k_proj", "v_proj"))


def _orion_shapes(c: Config) -> Shapes:
    return _llama_shapes(c, norm_bias=True)


LLAMA = NumpyModel(_llama_shapes, _llama_logits)
MODELS = {
    "AquilaForCausalLM": LLAMA,
    "XverseForCausalLM": LLAMA,
    "YiForCausalLM": NumpyModel(_yi_shapes, _yi_logits),
    "MiniCPMForCausalLM": NumpyModel(_minicpm_shapes, _llama_logits),
    "OrionForCausalLM": NumpyModel(_orion_shapes, _llama_logits),
    "InternLMForCausalLM": NumpyModel(_internlm_shapes, _llama_logits),
    "InternLM3ForCausalLM": NumpyModel(_internlm3_shapes, _llama_logits),
    "InternLM2ForCausalLM": NumpyModel(_internlm2_shapes, _internlm2_logits),
    "ChatGLMModel": NumpyModel(_chatglm_shapes, _chatglm_logits),
    "BaichuanForCausalLM": NumpyModel(_baichuan_shapes, _baichuan_logits),
    "QWenLMHeadModel": NumpyModel(_qwen_shapes, _qwen_logits),
    "ExaoneForCausalLM": NumpyModel(_exaone_shapes, _exaone_logits),
    "TeleChat2ForCausalLM": NumpyModel(_telechat_shapes, _telechat_logits),
}


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, Array]:
    """float32 tensors: norms near 1, biases and weights near 0."""
    rng = np.random.default_rng(seed)

    def values(name: str, shape: tuple[int, ...]) -> Array:
        is_norm = len(shape) == 1 and name.endswith(".weight")
        spread = 0.2 if len(shape) == 2 else 0.3
        return (float(is_norm) + spread * rng.standard_normal(shape)).astype(np.float32)

    return {name: values(name, shape) for name, shape in shapes.items()}


def save_numpy_model(directory: Path, architecture: str, config: Config) -> dict[str, Array]:
    """Save a random checkpoint of a family; return its tensors."""
    tensors = random_tensors(MODELS[architecture].shapes(config))
    save_file(tensors, directory / "model.safetensors")
    whole = {"architectures": [architecture], **config}
    (directory / "config.json").write_text(json.dumps(whole))
    return tensors
