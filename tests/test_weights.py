"""Checkpoints of every format become the same model; a bad one becomes an error, not a model."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxengine.convert import Family, families
from jaxengine.pallas_kernels.target import Target

from jaxengine import convert
from jaxengine.model_config import ModelConfig
from jaxengine.models.options import ModelOptions
from jaxengine.models.registry import ModelRegistry
from jaxengine.sharding import make_mesh
from jaxengine.weights import (
    ParamSpec,
    _repeat_kv_heads,
    load_params,
    merge_params,
    open_model,
    param_specs,
    random_params,
)
from tests.convert.tiny import expected_parameters, make_model
from tests.convert.tiny_gguf import write_model
from tests.helpers import greedy, hf_greedy, make_llm, output_ids

MESH = make_mesh(jax.devices()[:1])
PROMPT = [5, 17, 30, 8, 41]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("Llama")


@pytest.fixture(scope="module")
def sources(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every format."""
    import torch

    base = tmp_path_factory.mktemp("formats")
    found = {name: base / name for name in ("safetensors", "pt", "converted")}
    model.save_pretrained(found["safetensors"])
    found["pt"].mkdir()
    torch.save(model.state_dict(), found["pt"] / "pytorch_model.bin")
    config = (found["safetensors"] / "config.json").read_text()
    (found["pt"] / "config.json").write_text(config)
    convert.convert_checkpoint(str(found["safetensors"]), str(found["converted"]))
    found["gguf"] = write_model(base / "model.gguf", model, "llama")
    return found


def specs_of(
    source: Path, dtype: str = "float32", **chosen: Any
) -> tuple[Any, dict[str, ParamSpec]]:
    config = ModelConfig.from_hf(open_model(source).hf_config, dtype)
    options = ModelOptions(max_model_len=64, target=Target.of(jax.devices()[0]), **chosen)
    factory = ModelRegistry.resolve(config.architecture)
    return param_specs(lambda: factory(config, options))


@pytest.mark.parametrize("load_format", ["safetensors", "pt", "converted", "gguf"])
def test_every_format_loads_in_one_go_and_gives_the_tokens_of_transformers(
    sources: dict[str, Path], model: Any, load_format: str
) -> None:
    llm = make_llm(sources[load_format], load_format=load_format, skip_tokenizer_init=True)
    (tokens,) = output_ids(llm.generate([PROMPT], greedy(6), use_tqdm=False))
    assert tokens == hf_greedy(model, PROMPT, 6)


@pytest.mark.parametrize("load_format", ["safetensors", "pt", "converted", "gguf"])
def test_loaded_parameters_are_those_of_the_checkpoint(
    sources: dict[str, Path], model: Any, load_format: str
) -> None:
    source = sources[load_format]
    _, specs = specs_of(source)
    params = load_params(open_model(source), specs, MESH, show_progress=False)
    expected = expected_parameters(model)
    assert params.keys() == expected.keys() == specs.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(np.asarray(value), expected[path], err_msg=path)
        assert value.sharding.spec == specs[path].spec


def test_input_major_weights_have_the_input_axes_in_front(sources: dict[str, Path]) -> None:
    source = sources["safetensors"]
    plain, turned = (
        load_params(open_model(source), specs, MESH, show_progress=False)
        for _, specs in (specs_of(source), specs_of(source, input_major=True))
    )
    num_in_axes = {"o_proj.weight": 2, "proj.weight": 1, "tokens.weight": 1, "head.weight": 1}
    num_turned = 0
    for path, value in turned.items():
        count = next((n for end, n in num_in_axes.items() if path.endswith(end)), 0)
        axes = range(-count, value.ndim - count)
        np.testing.assert_array_equal(np.asarray(value), plain[path].transpose(axes), err_msg=path)
        num_turned += count > 0
    assert num_turned == 4 * 2 + 2


def test_parameters_are_cast_to_the_dtype_of_the_model(
    sources: dict[str, Path], model: Any
) -> None:
    source = sources["safetensors"]
    _, specs = specs_of(source, "bfloat16")
    params = load_params(open_model(source), specs, MESH, show_progress=False)
    expected = expected_parameters(model)["norm.weight"].astype(jnp.bfloat16)
    assert {value.dtype for value in params.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(np.asarray(params["norm.weight"]), expected)


def test_a_format_that_is_not_there_is_refused(sources: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="holds safetensors weights, not 'pt'"):
        open_model(sources["safetensors"], "pt")


def test_a_parameter_that_the_checkpoint_lacks_is_named(sources: dict[str, Path]) -> None:
    source = sources["safetensors"]
    _, specs = specs_of(source)
    extra = {**specs, "layers.7.input_norm.weight": specs["norm.weight"]}
    with pytest.raises(ValueError, match=r"lacks 1 parameters: layers\.7\.input_norm\.weight"):
        load_params(open_model(source), extra, MESH, show_progress=False)


@pytest.mark.parametrize("path", ["norm.weight", "layers.0.attention.qkv_proj.weight"])
def test_a_parameter_of_another_shape_is_named_with_both_shapes(
    sources: dict[str, Path], path: str
) -> None:
    source = sources["safetensors"]
    _, specs = specs_of(source)
    wrong = dataclasses.replace(specs[path], shape=(*specs[path].shape[:-1], 7))
    with pytest.raises(ValueError, match=rf"{path} has shape .*, the model needs .*7"):
        load_params(open_model(source), {**specs, path: wrong}, MESH, show_progress=False)


def test_a_stage_reads_only_its_own_parameters(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources["safetensors"]
    _, specs = specs_of(source)
    mine = {path: spec for path, spec in specs.items() if path.startswith("layers.1.")}
    read: list[str] = []
    load = convert.Parameter.load

    def record(self: Any, index: Any = None) -> np.ndarray:
        read.append(self.path)
        return load(self, index)

    monkeypatch.setattr(convert.Parameter, "load", record)
    params = load_params(open_model(source), mine, MESH, show_progress=False)
    assert set(params) == set(read) == set(mine) != set()


def slow_repeat(whole: np.ndarray, repeats: int) -> np.ndarray:
    """Every KV head ``repeats`` times, each time with its share of the queries."""
    heads = []
    for head in whole:
        queries, key_value = head[:-2], head[-2:]
        for share in np.split(queries, repeats):
            heads.append(np.concatenate([share, key_value]))
    return np.stack(heads)


@pytest.mark.parametrize(("num_kv_heads", "group", "repeats"), [(2, 4, 2), (1, 8, 8), (3, 6, 3)])
@pytest.mark.parametrize("rest", [(3, 5), ()], ids=["weight", "bias"])
def test_kv_heads_are_repeated_for_more_shards_than_heads(
    num_kv_heads: int, group: int, repeats: int, rest: tuple[int, ...]
) -> None:
    shape = (num_kv_heads, group + 2, *rest)
    whole = np.arange(np.prod(shape)).reshape(shape)
    source: Any = SimpleNamespace(path="qkv", shape=shape, load=lambda index: whole[index])
    expected = slow_repeat(whole, repeats)
    read = _repeat_kv_heads(source, expected.shape)
    np.testing.assert_array_equal(read(None), expected)
    for head in range(num_kv_heads * repeats):  # as a device reads its share
        index = (slice(head, head + 1), *[slice(None)] * (1 + len(rest)))
        np.testing.assert_array_equal(read(index), expected[index])


def test_dummy_weights_need_only_the_config_and_follow_the_seed(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((sources["safetensors"] / "config.json").read_text())
    checkpoint = open_model(tmp_path, "dummy")
    assert checkpoint.format == "dummy"
    _, specs = specs_of(sources["safetensors"])
    first, again, other = (random_params(specs, MESH, seed) for seed in (0, 0, 1))
    assert (np.asarray(first["norm.weight"]) == 1).all()
    table = np.asarray(first["embed_tokens.weight"])
    assert 0.015 < table.std() < 0.025
    np.testing.assert_array_equal(table, again["embed_tokens.weight"])
    assert not np.array_equal(table, other["embed_tokens.weight"])
    gates = [np.asarray(first[f"layers.{i}.mlp.gate_up_proj.weight"]) for i in range(2)]
    assert not np.array_equal(*gates)


def test_dummy_weights_without_a_config_say_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_format 'dummy' needs .*config\.json: not found"):
        open_model(tmp_path, "dummy")


def test_an_llm_runs_on_dummy_weights(sources: dict[str, Path]) -> None:
    llm = make_llm(sources["safetensors"], load_format="dummy", skip_tokenizer_init=True)
    (tokens,) = output_ids(llm.generate([PROMPT], greedy(3), use_tqdm=False))
    assert len(tokens) == 3


def test_a_model_put_together_again_is_the_one_taken_apart(sources: dict[str, Path]) -> None:
    definition, specs = specs_of(sources["safetensors"])
    params = random_params(specs, MESH, 0)
    merged = merge_params(definition, params)
    assert merged.norm.weight[...] is params["norm.weight"]
    assert merged.layers["1"].mlp.down_proj.weight[...] is (params["layers.1.mlp.down_proj.weight"])


@pytest.fixture
def outside_architecture() -> Iterator[str]:
    yield "OutsideForCausalLM"
    families._families.pop("OutsideForCausalLM", None)


def test_an_outside_package_can_register_a_model_and_its_rules(
    sources: dict[str, Path], model: Any, outside_architecture: str
) -> None:
    overrides = {"architectures": [outside_architecture]}
    source = sources["safetensors"]
    with pytest.raises(ValueError, match=outside_architecture):
        make_llm(source, hf_overrides=overrides, skip_tokenizer_init=True)
    llama = families.family_of({"architectures": ["LlamaForCausalLM"]})
    ModelRegistry.register_model(Family((outside_architecture,), llama.spec, llama.table))
    llm = make_llm(source, hf_overrides=overrides, skip_tokenizer_init=True)
    (tokens,) = output_ids(llm.generate([PROMPT], greedy(3), use_tqdm=False))
    assert tokens == hf_greedy(model, PROMPT, 3)
