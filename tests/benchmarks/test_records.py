"""What the benchmarks share: percentiles, lines of JSON, child processes."""

import json
from pathlib import Path

import pytest

from benchmarks.records import ROOT, ChildError, last_complaint, percentiles, publish, run_child


def test_percentiles_are_scaled_to_the_unit_asked_for() -> None:
    values = [i / 1000 for i in range(1, 102)]  # 1 to 101 ms
    assert percentiles(values, 1e3) == {"median": 51.0, "p90": 91.0, "p99": 100.0}


def test_publish_appends_the_lines_that_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"old": 1}\n')
    publish([{"a": 1}, {"b": 2}], file)
    assert file.read_text() == '{"old": 1}\n{"a": 1}\n{"b": 2}\n'
    assert capsys.readouterr().out == '{"a": 1}\n{"b": 2}\n'


def test_a_child_returns_its_json_lines_and_sees_its_environment() -> None:
    code = "import os, json; print('a table'); print(json.dumps({'x': os.environ['COLOUR']}))"
    assert run_child(["-c", code], {"COLOUR": "blue"}) == [{"x": "blue"}]


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(ChildError, match=r"^ValueError: pipeline 2 is too many$"):
        run_child(["-c", "raise ValueError('pipeline 2 is too many')"])


def test_the_exception_is_found_before_other_noise() -> None:
    stderr = "Traceback ...\njaxengine.X.SomeError: because\nleaked 3 objects\n"
    assert last_complaint(stderr) == "jaxengine.X.SomeError: because"
    assert last_complaint("killed\n") == "killed"
    assert last_complaint("") == ""


def test_every_line_of_the_results_is_a_record() -> None:
    files = list((ROOT / "benchmarks/results").glob("*.jsonl"))
    assert files
    for line in (line for file in files for line in file.read_text().splitlines()):
        assert {"date", "commit", "device", "jax"} <= json.loads(line).keys()
