"""The rows of a dataset, cut into shards, and the files of their results; without a cluster."""

import concurrent.futures
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra: pip install 'jaxengine[ray]'")

import pyarrow
import pyarrow.parquet

from jaxengine import SamplingParams
from jaxengine.engine_thread import EngineError
from jaxengine.on_ray.batch import generate_dataset, main
from jaxengine.on_ray.json_output import with_fields
from jaxengine.on_ray.output_directory import OutputDirectory, ShardCounts
from jaxengine.on_ray.serve import build_app, parse_request
from jaxengine.on_ray.shard_worker import ShardWorker
from jaxengine.on_ray.shards import Shard, open_dataset


def save_jsonl(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def save_parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def all_rows(shards: list[Shard]) -> list[tuple[int, Any]]:
    return [(number, row["prompt"]) for shard in shards for number, row in shard.rows()]  # type: ignore[index]


# Reading.


@pytest.mark.parametrize("rows_per_shard", [1, 2, 3, 4, 5, 7, 20])
def test_shards_hold_every_row_once_in_order(tmp_path: Path, rows_per_shard: int) -> None:
    save_jsonl(tmp_path / "a.jsonl", [f"a{i}" for i in range(5)])
    save_parquet(tmp_path / "b.parquet", id=list(range(8)), prompt=[f"b{i}" for i in range(8)])
    save_jsonl(tmp_path / "c.jsonl", ["c0"])
    shards = open_dataset(tmp_path, rows_per_shard).shards
    expected = [*(f"a{i}" for i in range(5)), *(f"b{i}" for i in range(8)), "c0"]
    assert all_rows(shards) == list(enumerate(expected))
    assert [shard.num_rows for shard in shards[:-1]] == [rows_per_shard] * (len(shards) - 1)
    assert [Shard.from_json(shard.to_json()) for shard in shards] == shards


def test_blank_lines_are_no_rows_and_lines_that_are_no_objects_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "ä"}\n  \n{oops\n[1]\n\n{"prompt": "b"}')
    (shard,) = open_dataset(path, 10).shards
    rows = dict(shard.rows())
    assert (rows[0], rows[3]) == ({"prompt": "ä"}, {"prompt": "b"})
    assert "not JSON" in str(rows[1])
    assert "not a JSON object: [1]" in str(rows[2])
    assert len(rows) == 4


def test_a_pattern_a_folder_and_a_list_name_files(tmp_path: Path) -> None:
    b, a = save_jsonl(tmp_path / "b.jsonl", ["b"]), save_jsonl(tmp_path / "a.jsonl", ["a"])
    for source in (tmp_path, f"{tmp_path}/*.jsonl", [a, b]):
        assert all_rows(open_dataset(source, 5).shards) == [(0, "a"), (1, "b")]
    assert all_rows(open_dataset([b, a], 5).shards) == [(0, "b"), (1, "a")]


def test_a_source_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no file"):
        open_dataset(tmp_path / "missing.jsonl", 5)
    (tmp_path / "x.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match="is neither a"):
        open_dataset(tmp_path / "x.csv", 5)
    with pytest.raises(ValueError, match="neither a column 'prompt' nor 'messages', only text"):
        open_dataset(save_parquet(tmp_path / "x.parquet", text=["a"]), 5)
    with pytest.raises(ValueError, match="there is no row"):
        open_dataset(save_jsonl(tmp_path / "x.jsonl", []), 5)
    with pytest.raises(ValueError, match="rows_per_shard is 0"):
        open_dataset(tmp_path, 0)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = save_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    before = open_dataset(path, 5).fingerprint
    assert open_dataset(path, 1).fingerprint == before
    save_jsonl(path, ["a", "c"])
    assert open_dataset(path, 5).fingerprint != before


# Results.


def test_a_run_goes_on_only_with_its_own_parameters(tmp_path: Path) -> None:
    output = OutputDirectory(tmp_path / "out")
    manifest = {"model": "m", "sampling_params": {"temperature": 0.0, "stop": ["a"]}}
    output.prepare(manifest)
    output.prepare(manifest)
    other = {"model": "m", "sampling_params": {"temperature": 0.5, "stop": ["b"]}, "rows": 3}
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the text is checked below
        output.prepare(other)
    assert "sampling_params.temperature was 0.0 and is now 0.5" in str(refused.value)
    assert "sampling_params.stop[0] was 'a' and is now 'b'" in str(refused.value)
    assert "rows was None and is now 3" in str(refused.value)


def test_results_of_an_unknown_run_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "part-000000.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"holds results but no manifest\.json"):
        OutputDirectory(tmp_path).prepare({})


def test_a_shard_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    output = OutputDirectory(tmp_path)
    (shard,) = open_dataset(save_jsonl(tmp_path / "a.jsonl", ["a", "b"]), 2).shards

    def rows_of_a_dying_replica() -> Any:
        yield {"row": 0, "outputs": []}
        raise EngineError("died")

    with pytest.raises(EngineError):
        output.write(0, rows_of_a_dying_replica())
    assert output.counts(shard) is None
    assert not output.part_path(0).exists()
    output.write(0, [{"row": 0, "outputs": []}, {"row": 1, "error": "empty"}])
    assert output.counts(shard) == ShardCounts(num_rows=2, num_errors=1)
    output.remove_leftovers()
    assert [path.name for path in tmp_path.glob("*.tmp")] == []
    output.part_path(0).write_text('{"row": 0}\n')  # somebody has cut it
    assert output.counts(shard) is None


def make_worker(model: Path, directory: Path, **sampling: Any) -> ShardWorker:
    directory.mkdir()
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "num_gpu_blocks_override": 65}
    params = SamplingParams(ignore_eos=True, **sampling)
    engine_args = {**sizes, "disable_log_stats": True}
    return ShardWorker(str(model), engine_args, params, OutputDirectory(directory))


def test_a_random_row_has_the_same_tokens_on_any_replica(tmp_path: Path, chat_model: Path) -> None:
    source = save_jsonl(tmp_path / "a.jsonl", ["the fox", "the fox", "the dog"])
    (shard,) = open_dataset(source, 3).shards
    lines = []
    for name in ("one", "two"):
        worker = make_worker(chat_model, tmp_path / name, temperature=1.0, max_tokens=8)
        if name == "two":  # this one has had another request before
            worker._engine.result(prompt="once").result()
        worker({"shard": [shard.to_json()]})
        worker._engine.close()
        lines.append((tmp_path / name / "part-000000.jsonl").read_text().splitlines())
    assert lines[0] == lines[1]
    first, second, _ = (json.loads(line)["outputs"][0]["token_ids"] for line in lines[0])
    assert first != second


def test_shards_that_are_done_at_the_same_time_share_the_batch(
    tmp_path: Path, chat_model: Path
) -> None:
    shards = open_dataset(save_jsonl(tmp_path / "a.jsonl", ["the fox"] * 8), 1).shards
    worker = make_worker(chat_model, tmp_path / "out", temperature=0.0, max_tokens=50)
    batches = [{"shard": [shard.to_json()]} for shard in shards]
    for batch in batches[:4]:
        worker(batch)
    num_steps_alone = worker._engine.num_steps
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(worker, batches[4:]))
    assert worker._engine.num_steps - num_steps_alone < num_steps_alone
    assert counts == [{"num_rows": [1], "num_errors": [0]}] * 4
    num_steps = worker._engine.num_steps
    worker(batches[0])  # stored: a replica that is started again does not do it again
    assert worker._engine.num_steps == num_steps
    worker._engine.close()


# Parameters.


def test_a_mistake_is_found_before_a_replica_starts(tmp_path: Path) -> None:
    source = save_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(ValueError, match="block_size 3"):
        generate_dataset(source, tmp_path / "out", "m", engine_args={"block_size": 3})
    with pytest.raises(ValueError, match="nnodes is 2: a replica that Ray places"):
        build_app({"model": "m", "nnodes": 2})
    with pytest.raises(ValueError, match="logprobs are not written"):
        generate_dataset(source, tmp_path / "out", "m", SamplingParams(logprobs=1))
    with pytest.raises(ValueError, match="num_replicas is 0"):
        generate_dataset(source, tmp_path / "out", "m", num_replicas=0)


def test_the_command_names_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["m", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out")]) == 2
    assert "names no file" in capsys.readouterr().err


def test_a_request_names_its_sampling_parameters() -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 3, "stop": "b", "stream": True}).encode()
    parsed = parse_request(body, SamplingParams(top_k=7))
    params = parsed["sampling_params"]
    assert (params.max_tokens, params.stop, params.top_k) == (3, ["b"], 7)
    assert (parsed["prompt"], parsed["is_stream"]) == ("a", True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"prompt": "a", "stream": 1}', "stream must be true or false"),
        (b'{"prompt": "a", "top_n": 1, "best_of": 2}', "best_of, top_n: no such field"),
        (b'{"prompt": "a", "logprobs": 1}', "logprobs: no such field"),
        (b'{"prompt": "a", "temperature": -1}', "temperature must be 0"),
        (b'{"prompt": "a", "stop": 5}', "wrong type"),
    ],
)
def test_a_request_that_is_not_possible_is_a_value_error(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_request(body, SamplingParams())


def test_null_is_a_value_like_any_other() -> None:
    assert with_fields(SamplingParams(), {"max_tokens": None}).max_tokens is None


def test_without_ray_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['ray'] = None; import jaxengine.on_ray"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "pip install 'jaxengine[ray]'" in run.stderr
