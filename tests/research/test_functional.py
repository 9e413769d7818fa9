"""The model as a pure function: transformers and torch's autograd say what is right."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine import LLM
from jaxengine.research.points import chosen_points
from tests.helpers import greedy, hf_logits, make_llm, output_ids, random_prompts, save_tiny_model

SIZES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 48, "n_positions": 256},
    "Gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "Phi": {"num_key_value_heads": 4},
    "Qwen3": {"head_dim": 8},
    "Mixtral": {"num_local_experts": 4},
}
# What transformers calls: each layer, and in it attention and what follows it.
BODY = {"GPT2": ("transformer", "h", "attn", "mlp", "ln_f", "wte")}
USUAL = ("model", "layers", "self_attn", "mlp", "norm", "embed_tokens")
TOKENS, OTHER = random_prompts(13, 9)
Pair = tuple[str, LLM, Any]


@pytest.fixture(scope="module", params=SIZES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp(request.param)
    model = save_tiny_model(directory, request.param, **SIZES[request.param])
    llm = make_llm(directory, skip_tokenizer_init=True, max_model_len=256)
    return request.param, llm, model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = tmp_path_factory.mktemp("one")
    save_tiny_model(directory, "Llama")
    return make_llm(directory, skip_tokenizer_init=True, max_model_len=256)


def test_logits_and_points_equal_those_of_transformers(pair: Pair) -> None:
    family, llm, hf = pair
    model = llm.functional()
    logits, seen = model.apply(model.weights, jnp.array(TOKENS), capture="*")
    assert list(seen) == [point.name for point in llm.points()]
    for point in llm.points():
        shape = tuple(len(TOKENS) if size == "T" else size for size in point.shape)
        assert seen[point.name].shape == shape, point
    np.testing.assert_allclose(logits, hf_logits(hf, TOKENS), atol=1e-4)
    plain = model.apply(model.weights, jnp.array(TOKENS))
    np.testing.assert_allclose(plain, logits, atol=1e-4)
    for name, value in hooked(family, hf).items():
        np.testing.assert_allclose(seen[name], value, atol=1e-4, err_msg=name)


def hooked(family: str, hf: Any) -> dict[str, np.ndarray]:
    """What passes through transformers' modules, under the names of our points."""
    import torch

    body_name, layers, attention, mlp, norm, _ = BODY.get(family, USUAL)
    body, values, removers = getattr(hf, body_name), {}, []

    def keep(module: Any, name: str, of_input: bool = False) -> None:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            value = given if of_input else output
            value = value[0] if isinstance(value, tuple) else value
            values[name] = value.detach().reshape(len(TOKENS), -1).numpy()

        removers.append(module.register_forward_hook(hook, with_kwargs=True))

    for number, layer in enumerate(getattr(body, layers)):
        own = f"layers.{number}"
        keep(layer, f"{own}.input", of_input=True)
        # The last layer's output is the final norm's input: transformers may return less.
        keep(layer, f"{own}.output")
        keep(getattr(layer, attention), f"{own}.attention.input", of_input=True)
        if family == "Gemma2":
            keep(layer.post_attention_layernorm, f"{own}.attention.added")
            keep(layer.pre_feedforward_layernorm, f"{own}.middle", of_input=True)
            keep(layer.post_feedforward_layernorm, f"{own}.mlp.added")
        else:
            feed_forward = getattr(layer, mlp, None) or layer.block_sparse_moe
            keep(getattr(layer, attention), f"{own}.attention.added")
            keep(feed_forward, f"{own}.mlp.input", of_input=True)
            keep(feed_forward, f"{own}.mlp.added")
    keep(body.final_layernorm if family == "Phi" else getattr(body, norm), "final")
    with torch.no_grad():
        hf(torch.tensor([TOKENS]))
    for remover in removers:
        remover.remove()
    assert len(values) > 15
    return values


def test_gradients_equal_those_of_torch(pair: Pair) -> None:
    import torch

    family, llm, hf = pair
    model = llm.functional()
    tokens = jnp.array(TOKENS)

    def loss(weights: Any, embedding: Any) -> Any:
        logits = model.apply(weights, tokens, edits={"embedding": embedding})
        return -jnp.mean(jax.nn.log_softmax(logits[:-1])[jnp.arange(len(TOKENS) - 1), tokens[1:]])

    _, seen = model.apply(model.weights, tokens, capture="embedding")
    by_weights, by_embedding = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        model.weights, seen["embedding"]
    )
    body_name, *_, norm, _ = BODY.get(family, USUAL)
    body = getattr(hf, body_name)
    first: list[Any] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        first.append(args[0] if args else kwargs["hidden_states"])
        first[0].retain_grad()

    layers = body.h if family == "GPT2" else body.layers
    remover = layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    hf.zero_grad()
    logits = hf(torch.tensor([TOKENS])).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(TOKENS[1:])).backward()
    remover.remove()
    np.testing.assert_allclose(by_embedding, first[0].grad[0].numpy(), atol=1e-4)
    last = body.final_layernorm if family == "Phi" else getattr(body, norm)
    np.testing.assert_allclose(by_weights["norm.weight"], last.weight.grad, atol=1e-4)
    if family not in ("GPT2", "Gemma2") and not hf.config.tie_word_embeddings:
        # The embedding is read at "embedding" only, which is replaced: its gradient is nothing.
        assert not np.any(by_weights["embed_tokens.weight"])
        np.testing.assert_allclose(
            by_weights["lm_head.weight"].T, hf.lm_head.weight.grad, atol=1e-4
        )
    down = {"Phi": "mlp.fc2", "GPT2": "mlp.c_proj"}.get(family, "mlp.down_proj")
    if family != "Mixtral":
        theirs = layers[1].get_submodule(down).weight.grad.numpy()
        theirs = theirs if family == "GPT2" else theirs.T  # [in, out], as a CPU's weights lie
        ours = by_weights["layers.1.mlp.down_proj.weight"]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    else:
        theirs = layers[1].mlp.gate.weight.grad.numpy()
        np.testing.assert_allclose(by_weights["layers.1.mlp.router"], theirs, atol=1e-4)


def test_packed_sequences_do_not_see_each_other(pair: Pair) -> None:
    _, llm, hf = pair
    model = llm.functional()
    packed = jnp.array(TOKENS + OTHER)
    segments = jnp.array([4] * len(TOKENS) + [1] * len(OTHER))
    logits = jax.jit(model.apply)(model.weights, packed, segment_ids=segments)
    alone = np.concatenate([hf_logits(hf, TOKENS), hf_logits(hf, OTHER)])
    np.testing.assert_allclose(logits, alone, atol=1e-4)


@pytest.mark.parametrize("pair", ["Gemma2", "Mixtral"], indirect=True)
def test_transformations_of_jax_work(pair: Pair) -> None:
    _, llm, _ = pair
    model = llm.functional()
    rows = jnp.array([TOKENS[:9], OTHER])
    many = jax.vmap(model.apply, in_axes=(None, 0))(model.weights, rows)
    one = model.apply(model.weights, rows[1])
    np.testing.assert_allclose(many[1], one, atol=1e-4)

    def of_embedding(x: Any) -> Any:
        return model.apply(model.weights, rows[1], edits={"embedding": x})

    x = model.apply(model.weights, rows[1], capture="embedding")[1]["embedding"]
    direction = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype)
    _, tangent = jax.jvp(of_embedding, (x,), (direction,))
    along = jax.grad(lambda x: jnp.vdot(jax.checkpoint(of_embedding)(x), one))(x)
    np.testing.assert_allclose(jnp.vdot(tangent, one), jnp.vdot(along, direction), rtol=1e-3)


def test_weights_are_the_engines_own_arrays(llama: LLM) -> None:
    model = llama.functional()
    own = llama.engine.runner.stages[0].params
    assert all(model.weights[path] is array for path, array in own.items())
    before = output_ids(llama.generate([TOKENS], greedy(4), use_tqdm=False))
    jax.jit(model.apply)(model.weights, jnp.array(TOKENS)).block_until_ready()
    llama.reset_prefix_cache()
    assert output_ids(llama.generate([TOKENS], greedy(4), use_tqdm=False)) == before


def test_edits_steer_and_patch(llama: LLM) -> None:
    model = llama.functional()
    tokens = jnp.array(TOKENS)
    plain, seen = model.apply(model.weights, tokens, capture="layers.1.output")
    patched = model.apply(model.weights, tokens, edits={"layers.1.output": seen["layers.1.output"]})
    np.testing.assert_allclose(patched, plain, atol=1e-5)

    def steered(vector: Any) -> Any:
        edits = {"layers.*.mlp.added": lambda value: value + vector}
        return jnp.sum(model.apply(model.weights, tokens, edits=edits)[-1, :5])

    vector = jnp.zeros(32)
    slope = jax.grad(steered)(vector)
    step = 1e-2 * slope / jnp.linalg.norm(slope)
    rise = (steered(step) - steered(-step)) / 2
    np.testing.assert_allclose(rise, jnp.vdot(slope, step), rtol=1e-2)
    ablated = {"layers.0.attention.heads": lambda value: value.at[:, 2].set(0)}
    assert not np.allclose(model.apply(model.weights, tokens, edits=ablated), plain, atol=1e-3)


def test_names_wildcards_and_ranges(llama: LLM) -> None:
    def chosen(*wanted: str) -> list[str]:
        return [point.name for point in chosen_points(llama.points(), wanted)]

    assert chosen("layers.1:.output") == ["layers.1.output", "layers.2.output"]
    assert chosen("layers.-1.output", "embedding") == ["embedding", "layers.2.output"]
    assert chosen("layers.*.middle") == [f"layers.{number}.middle" for number in range(3)]
    for wrong in ("layers.3.output", "layers.0.atention.added", "layers.7:9.output", "layers.a:.b"):
        with pytest.raises(ValueError, match="no point"):
            chosen(wrong)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.added"):
        chosen("layers.0.atention.added")


def test_what_does_not_fit_is_refused(llama: LLM) -> None:
    model = llama.functional()
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        model.apply(model.weights, jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="positions"):
        model.apply(model.weights, jnp.array(TOKENS), jnp.arange(3))
    fewer = {path: array for path, array in model.weights.items() if path != "norm.weight"}
    with pytest.raises(ValueError, match=r"norm\.weight"):
        model.apply(fewer, jnp.array(TOKENS))
    with pytest.raises(ValueError, match=r"\(13, 32\)"):
        model.apply(model.weights, jnp.array(TOKENS), edits={"embedding": jnp.zeros((1, 32))})
    with pytest.raises(ValueError, match="keeps the shape"):
        model.apply(model.weights, jnp.array(TOKENS), edits={"final": lambda value: value[:1]})
