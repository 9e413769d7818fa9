import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxengine.convert import Checkpoint, Family, open_checkpoint, parameters, register_family
from jaxengine.convert.rules import Table, same

from tests.convert.tiny import (
    FAMILIES,
    assert_same_tree,
    expected_parameters,
    make_model,
    save_model,
    state,
)
from tests.models import numpy_cases
from tests.models.numpy_models import save_numpy_model


def load_all(checkpoint: Checkpoint, dtype: str | None = None) -> dict[str, np.ndarray]:
    return {p.path: p.load() for p in parameters(checkpoint, dtype)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_equals_the_state_dict_rearranged(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path, family)
    assert_same_tree(load_all(open_checkpoint(tmp_path)), expected_parameters(model))


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_llama_biases_are_read_where_the_config_has_them(
    tmp_path: Path, biases: dict[str, bool]
) -> None:
    model = save_model(tmp_path, "Llama", **biases)
    assert_same_tree(load_all(open_checkpoint(tmp_path)), expected_parameters(model))


def test_tied_embeddings_give_no_lm_head_even_if_the_file_has_one(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    expected = expected_parameters(model)
    del expected["lm_head.weight"]
    assert_same_tree(load_all(open_checkpoint(tmp_path)), expected)


def test_a_sharded_checkpoint_gives_the_same_as_a_single_file(tmp_path: Path) -> None:
    model = make_model("Qwen3")
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_tree(load_all(open_checkpoint(tmp_path)), expected_parameters(model))


def test_a_bfloat16_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    make_model("Llama").bfloat16().save_pretrained(tmp_path)
    dtypes = {p.dtype for p in parameters(open_checkpoint(tmp_path))}
    assert dtypes == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_loading_in_another_dtype_rounds_as_numpy_does(tmp_path: Path, dtype: str) -> None:
    model = save_model(tmp_path, "Llama")
    expected = {k: v.astype(np.dtype(dtype)) for k, v in expected_parameters(model).items()}
    found = load_all(open_checkpoint(tmp_path), dtype)
    assert {values.dtype for values in found.values()} == {np.dtype(dtype)}
    assert_same_tree(found, expected)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    with pytest.raises(ValueError, match="'int4' is not one of float32, float16, bfloat16"):
        parameters(open_checkpoint(tmp_path), "int4")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    directory = tmp_path_factory.mktemp("qwen2")
    model = save_model(directory, "Qwen2")
    return open_checkpoint(directory), expected_parameters(model)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_slice_equals_the_same_slice_of_the_whole(qwen2: Any, data: st.DataObject) -> None:
    checkpoint, expected = qwen2
    parameter = data.draw(st.sampled_from(list(parameters(checkpoint, "float32"))))
    cuts = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in
            parameter.shape]  # fmt: skip
    index = tuple(slice(start, stop) for start, stop in cuts)
    np.testing.assert_array_equal(parameter.load(index), expected[parameter.path][index])


def test_an_index_may_leave_out_bounds_and_trailing_axes(qwen2: Any) -> None:
    checkpoint, expected = qwen2
    parameter = next(p for p in parameters(checkpoint) if p.path.endswith("gate_up_proj.weight"))
    index = (slice(None), slice(8, None))
    np.testing.assert_array_equal(parameter[index], expected[parameter.path][index])


@pytest.mark.parametrize("index", [slice(0, 99), slice(0, 8, 2), slice(-3, None)])
def test_an_index_that_is_no_run_inside_the_shape_is_refused(qwen2: Any, index: slice) -> None:
    parameter = next(parameters(qwen2[0]))
    with pytest.raises(ValueError, match="does not cut a run out of an axis of 56"):
        parameter.load((index,))


def test_a_plain_tensor_is_a_view_of_the_file_and_read_only(tmp_path: Path) -> None:
    save_model(tmp_path)
    embedding = next(parameters(open_checkpoint(tmp_path))).load()
    assert not embedding.flags.owndata
    assert not embedding.flags.writeable


def edit_tensors(directory: Path, **changes: np.ndarray | None) -> None:
    """Rewrite model.safetensors with tensors replaced, or removed where None."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors") | changes
    kept = {name: values for name, values in tensors.items() if values is not None}
    save_file(kept, directory / "model.safetensors")


def problems(directory: Path) -> str:
    with pytest.raises(ValueError, match="does not match its config") as raised:
        parameters(open_checkpoint(directory))
    return str(raised.value)


def test_all_missing_tensors_are_named(tmp_path: Path) -> None:
    save_model(tmp_path)
    names = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")
    edit_tensors(tmp_path, **dict.fromkeys(names))
    text = problems(tmp_path)
    assert "missing tensors" in text
    assert all(name in text for name in names)


def test_an_untied_model_without_lm_head_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    edit_tensors(tmp_path, **{"lm_head.weight": None})
    assert "missing tensors: lm_head.weight" in problems(tmp_path)


def test_all_unknown_tensors_are_named(tmp_path: Path) -> None:
    save_model(tmp_path)
    names = ("model.layers.0.self_attn.extra.weight", "model.layers.2.mlp.up_proj.weight")
    edit_tensors(tmp_path, **{name: np.zeros(3, np.float32) for name in names})
    text = problems(tmp_path)
    assert "unknown tensors" in text
    assert all(name in text for name in names)


def test_a_mis_shaped_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    save_model(tmp_path)
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(tmp_path, **{name: np.zeros((32, 47), np.float32)})
    assert f"wrong shapes: {name} (expected (32, 48), found (32, 47))" in problems(tmp_path)


def test_a_bias_that_the_config_does_not_promise_is_an_unknown_tensor(tmp_path: Path) -> None:
    save_model(tmp_path)
    edit_tensors(tmp_path, **{"model.layers.0.self_attn.q_proj.bias": np.ones(96, np.float32)})
    assert "unknown tensors: model.layers.0.self_attn.q_proj.bias" in problems(tmp_path)


def test_biases_of_zeros_that_nobody_asked_for_add_nothing(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    edit_tensors(tmp_path, **{"model.layers.0.self_attn.q_proj.bias": np.zeros(96, np.float32)})
    assert_same_tree(load_all(open_checkpoint(tmp_path)), expected_parameters(model))


def test_a_checkpoint_of_the_bare_model_lacks_the_prefix(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Llama", tie_word_embeddings=True)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): values for name, values in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    assert "layers.0.mlp.up_proj.weight" in bare
    assert_same_tree(load_all(open_checkpoint(tmp_path)), expected_parameters(model))


def test_a_tied_checkpoint_may_keep_the_heads_name_alone(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Llama", tie_word_embeddings=True)
    values = state(model)["model.embed_tokens.weight"]
    edit_tensors(tmp_path, **{"lm_head.weight": values, "model.embed_tokens.weight": None})
    assert_same_tree(load_all(open_checkpoint(tmp_path)), expected_parameters(model))


def test_buffers_of_the_rotary_embedding_are_ignored(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path, **{name: np.zeros(4, np.float32)})
    assert_same_tree(load_all(open_checkpoint(tmp_path)), expected_parameters(model))


def test_a_quantised_weight_that_lacks_a_plane_is_named_with_those_it_has(tmp_path: Path) -> None:
    save_model(tmp_path)
    edit_tensors(tmp_path, **{"model.layers.0.mlp.up_proj.qweight": np.zeros(4, np.int32)})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the quantised weight has qweight, but lacks 'qzeros'"):
        parameters(open_checkpoint(tmp_path))


def unsupported(directory: Path, **config: Any) -> str:
    save_model(directory)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="upported") as raised:
        parameters(open_checkpoint(directory))
    return str(raised.value)


def test_an_unsupported_architecture_is_named_with_the_nearest_and_the_way_to_add_it(
    tmp_path: Path,
) -> None:
    text = unsupported(tmp_path, architectures=["Gemma4ForCausalLM"])
    assert text.startswith(
        "config.json: the architecture Gemma4ForCausalLM is not supported; the nearest of those "
        "that are: GemmaForCausalLM, "
    )
    assert "ModelRegistry.register_model (docs/adding-a-model.md)" in text


def test_an_architecture_like_no_other_is_named_without_nearest_ones(tmp_path: Path) -> None:
    text = unsupported(tmp_path, architectures=["Zzz"])
    assert text.startswith(
        "config.json: the architecture Zzz is not supported. docs/supported-models.md lists"
    )


@pytest.mark.parametrize(
    "architecture", ["PaliGemmaForConditionalGeneration", "WhisperForAudio", "BarkModel"]
)
def test_multimodal_and_speech_models_are_said_to_be_out_of_scope(
    tmp_path: Path, architecture: str
) -> None:
    assert "out of scope" in unsupported(tmp_path, architectures=[architecture])


def test_a_model_with_code_of_its_own_is_told_that_it_is_never_run(tmp_path: Path) -> None:
    text = unsupported(tmp_path, architectures=["MyModel"], auto_map={"AutoModel": "my.MyModel"})
    assert "never run" in text


def test_a_config_that_lacks_a_size_is_refused_with_its_name(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="lacks num_attention_heads"):
        parameters(open_checkpoint(tmp_path))


def test_another_package_can_register_a_family(tmp_path: Path) -> None:
    save_model(tmp_path)
    tensors: dict[str, np.ndarray | None] = dict.fromkeys(open_checkpoint(tmp_path).names)
    edit_tensors(tmp_path, **{**tensors, "their.table": np.ones((3, 2), np.float32)})
    (tmp_path / "config.json").write_text('{"architectures": ["TheirModelForTests"]}')
    table = Table((same("t", "their.table", (3, 2)),))
    family = Family(("TheirModelForTests",), lambda config: None, lambda spec: table)
    register_family(family)
    assert_same_tree(load_all(open_checkpoint(tmp_path)), {"t": np.ones((3, 2))})


def test_a_normalised_parameter_has_rows_of_length_one_in_any_part_of_it(tmp_path: Path) -> None:
    # Baichuan 2's output projection.
    config = numpy_cases.TINY["baichuan2 7b"][1]
    tensors = save_numpy_model(tmp_path, "BaichuanForCausalLM", config)
    head = {p.path: p for p in parameters(open_checkpoint(tmp_path))}["lm_head.weight"]
    stored = tensors["lm_head.weight"]
    expected = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    np.testing.assert_allclose(head.load(), expected, rtol=1e-6)
    part = head.load((slice(5, 9), slice(3, 20)))
    np.testing.assert_allclose(part, expected[5:9, 3:20], rtol=1e-6)
