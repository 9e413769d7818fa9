import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jaxengine.convert import hub, open_checkpoint
from jaxengine.convert.errors import CheckpointError

from tests.convert.tiny import make_model, save_model


def test_importing_convert_imports_neither_jax_nor_torch_nor_transformers() -> None:
    code = "import sys, jaxengine.convert; print([m for m in ('jax', 'torch', 'transformers', "
    code += "'orbax', 'huggingface_hub', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_directory_gives_config_tokenizer_and_generation_config(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("not the tokenizer's")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "safetensors"
    assert checkpoint.hf_config["hidden_size"] == 48
    assert checkpoint.tokenizer_files() == {"tokenizer.json": b"{}"}
    assert checkpoint.generation_config == {"eos_token_id": 2}


def test_tokenizer_and_templates_are_taken_whole_with_the_config(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    names = [
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "qwen.tiktoken"),
        *("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"),
        *("special_tokens_map.json", "chat_template.json", "tekken.json", "spiece.model"),
        "additional_chat_templates/tool_use.jinja",
    ]
    for name in names:
        (tmp_path / "model" / name).write_text(name)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.tokenizer_files() == {name: name.encode() for name in sorted(names)}
    checkpoint.write_tokenizer(tmp_path / "copy")
    written = {
        path.relative_to(tmp_path / "copy").as_posix(): path.read_bytes()
        for path in (tmp_path / "copy").rglob("*")
        if path.is_file()
    }
    config = (tmp_path / "model" / "config.json").read_bytes()
    assert written == {**checkpoint.tokenizer_files(), "config.json": config}


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [2, 5]}, {"temperature": 1.0}, (2, 5)),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 8]}, (7, 8)),
        ({}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": None}, None, ()),
    ],
)
def test_end_tokens_are_those_of_the_generation_config_or_else_of_the_config(
    tmp_path: Path, config: Any, generation_config: Any, expected: tuple[int, ...]
) -> None:
    save_model(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert open_checkpoint(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize("value", ["2", 2.5, -1, True, [None], {"a": 1}])
def test_an_end_token_that_is_no_token_is_named(tmp_path: Path, value: Any) -> None:
    save_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"eos_token_id of generation_config\.json is"):
        _ = checkpoint.eos_token_ids


def test_tensors_are_known_by_name_and_read_whole(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert sorted(checkpoint.names) == sorted(model.state_dict())
    assert checkpoint.nbytes("model.norm.weight") == 4 * 48
    expected = model.state_dict()["lm_head.weight"].numpy()
    assert (checkpoint.read("lm_head.weight") == expected).all()


def test_safetensors_are_preferred_where_a_pickle_is_there_too(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_checkpoint(tmp_path).format == "safetensors"


def sharded(directory: Path) -> dict[str, Any]:
    """Save a model in shards; returns the content of the index."""
    make_model("Llama").save_pretrained(directory, max_shard_size="20kB")
    index: dict[str, Any] = json.loads((directory / "model.safetensors.index.json").read_text())
    return index


def test_a_missing_shard_is_named_with_a_tensor_it_holds(tmp_path: Path) -> None:
    shard = sharded(tmp_path)["weight_map"]["model.norm.weight"]
    (tmp_path / shard).unlink()
    with pytest.raises(ValueError, match=rf"names the file '{shard}', which is missing; it holds"):
        open_checkpoint(tmp_path)


def test_a_shard_that_lacks_a_tensor_of_the_index_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    shard = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.ghost.weight"] = shard
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{shard} lacks tensors .*model\.ghost\.weight"):
        open_checkpoint(tmp_path)


def rewrite_shard(path: Path, change: Any) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_index_says_which_of_two_copies_counts(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)["weight_map"]
    right = weight_map["model.norm.weight"]
    expected = open_checkpoint(tmp_path).read("model.norm.weight").copy()
    for wrong in set(weight_map.values()) - {right}:
        rewrite_shard(tmp_path / wrong, lambda t: t.update({"model.norm.weight": expected + 1}))
    assert (open_checkpoint(tmp_path).read("model.norm.weight") == expected).all()


def test_tensors_and_files_that_the_index_does_not_name_do_not_count(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)["weight_map"]
    for shard in set(weight_map.values()):
        rewrite_shard(tmp_path / shard, lambda t: t.update({"stray": np.ones(3, np.float32)}))
    (tmp_path / "model-00099-of-00099.safetensors").write_bytes(b"never opened")
    assert sorted(open_checkpoint(tmp_path).names) == sorted(weight_map)


def test_a_tensor_in_another_shard_than_the_index_says_is_taken_with_a_warning(
    tmp_path: Path,
) -> None:
    index = sharded(tmp_path)
    shards = sorted(set(index["weight_map"].values()))
    right = index["weight_map"]["model.norm.weight"]
    expected = open_checkpoint(tmp_path).read("model.norm.weight").copy()
    index["weight_map"]["model.norm.weight"] = next(each for each in shards if each != right)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match=rf"it lies in {right} and is taken from there"):
        checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.read("model.norm.weight") == expected).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"x": 3}}', "the file of tensor 'x' is 3, expected a name"),
        ('{"weight_map": {"x": "' + "y" * 5000 + '"}}', "names the file 'yyy.*, which is missing"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": [1]}', "has no weight_map"),
        ("[" * 100_000, "nests JSON values deeper than 64"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json.*{message}"):
        open_checkpoint(tmp_path)


def test_an_index_cannot_point_outside_its_directory(tmp_path: Path) -> None:
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (tmp_path / "outside.safetensors").write_bytes(b"")
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"outside\.safetensors"):
        open_checkpoint(inside)


def test_a_sharded_pickled_checkpoint_is_read_through_its_index(tmp_path: Path) -> None:
    import torch

    tensors = make_model("Llama").state_dict()
    weight_map = {}
    for number, name in enumerate(tensors):
        file = f"pytorch_model-{number % 2}.bin"
        weight_map[name] = file
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        torch.save(part, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "pytorch_bin"
    assert sorted(checkpoint.names) == sorted(tensors)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "config.json is missing"), ("{", "is not valid JSON"), ("[]", "holds a JSON list")],
)
def test_a_bad_config_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    save_model(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_a_directory_without_weights_lists_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no weights: looked for .*, found readme\.md"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("source", ["./missing", "/missing/model", "no-organisation", "a/b/c"])
def test_a_path_that_is_not_there_is_refused_without_asking_the_hub(source: str) -> None:
    with pytest.raises(ValueError, match="is neither a directory, a GGUF file nor a hub name"):
        open_checkpoint(source)


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[list[str]]:
    """Replace the hub's download by ``answer()``; returns the patterns each call asked for."""
    import huggingface_hub

    calls: list[list[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        assert name == "org/name"
        calls.append(allow_patterns)
        return str(answer())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_model_with_safetensors_is_fetched_without_its_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path)
    calls = fake_hub(monkeypatch, lambda: tmp_path)
    assert open_checkpoint("org/name").source == tmp_path
    assert calls[0] == ["config.json", "generation_config.json"]
    asked = [pattern for call in calls for pattern in call]
    assert "*.safetensors" in asked
    assert not any(pattern.endswith(".bin") for pattern in asked)


def test_a_hub_model_is_fetched_with_what_says_how_it_pools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path)
    calls = fake_hub(monkeypatch, lambda: tmp_path)
    open_checkpoint("org/name")
    asked = [pattern for call in calls for pattern in call]
    for file in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert any(fnmatch.fnmatch(file, pattern) for pattern in asked), file
    last = calls[-1]  # which leaves no folders out
    assert not any(fnmatch.fnmatch("onnx/model.safetensors", pattern) for pattern in last)


def test_a_config_that_cannot_be_used_ends_the_fetching_before_tokenizer_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Strange"]}')
    calls = fake_hub(monkeypatch, lambda: tmp_path)

    def refuse(config: dict[str, Any]) -> None:
        raise ValueError(f"no {config['architectures'][0]}")

    with pytest.raises(ValueError, match="no Strange"):
        open_checkpoint("org/name", check_config=refuse)
    assert calls == [["config.json", "generation_config.json"]]


def test_a_hub_model_without_safetensors_is_fetched_with_its_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    calls = fake_hub(monkeypatch, lambda: tmp_path)
    assert open_checkpoint("org/name").format == "pytorch_bin"
    assert any("pytorch_model*.bin" in call for call in calls)


def hub_error(monkeypatch: pytest.MonkeyPatch, kind: str) -> str:
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)

    def fail() -> None:
        error = getattr(errors, kind, None)
        if error is None:
            raise ConnectionError("no route")
        if issubclass(error, errors.HfHubHTTPError):
            raise error("refused", response=response)
        raise error("refused")

    fake_hub(monkeypatch, fail)
    with pytest.raises(ValueError, match="org/name") as raised:
        open_checkpoint("org/name")
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "remedies"),
    [
        ("GatedRepoError", ["gated", "HF_TOKEN"]),
        ("RepositoryNotFoundError", ["no model", "HF_TOKEN", "local directory"]),
        ("LocalEntryNotFoundError", ["could not be reached", "HF_HUB_OFFLINE", "local directory"]),
        ("RevisionNotFoundError", ["no branch, tag or commit", "None"]),
        ("OfflineModeIsEnabled", ["could not be reached", "HF_HUB_OFFLINE"]),
        ("HfHubHTTPError", ["could not be reached", "HF_ENDPOINT"]),
        ("a network that is down", ["could not be reached", "local directory"]),
    ],
)
def test_a_hub_that_does_not_give_the_model_is_an_error_with_remedies(
    monkeypatch: pytest.MonkeyPatch, kind: str, remedies: list[str]
) -> None:
    text = hub_error(monkeypatch, kind)
    assert all(remedy in text for remedy in remedies)


def test_a_hubs_own_error_is_given_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "a proxy between here and the hub says: " + "no " * 300 + "entry"

    def fail() -> None:
        raise ConnectionError(reason)

    fake_hub(monkeypatch, fail)
    with pytest.raises(CheckpointError, match=f"ConnectionError: {reason}$"):
        open_checkpoint("org/name")


@pytest.mark.parametrize("source", ["models/m.gguf", "./models/m", "/models/m"])
def test_a_file_that_is_not_there_is_called_missing(source: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{source}' is missing: it is neither"):
        open_checkpoint(source)


def test_hub_names_are_told_from_paths() -> None:
    assert hub.is_hub_name("meta-llama/Llama-3.1-8B")
    assert not any(map(hub.is_hub_name, ["gpt2", "./a/b", "/a/b", "../b", "a/b/c", "a/"]))
