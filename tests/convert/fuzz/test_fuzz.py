"""No damaged checkpoint does anything but load as it was, or end in an error that says why."""

from pathlib import Path

import pytest

from tests.convert.fuzz.corpus import FORMATS
from tests.convert.fuzz.run import GOOD, Reader, fuzz

CASES = 40
SLOW_CASES = 3000


def assert_good(name: str, cases: int, seed: int) -> None:
    counts, failures = fuzz(name, cases, seed)
    assert counts.total() == cases
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_the_same_or_a_clear_error(name: str) -> None:
    assert_good(name, CASES, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_thousands_of_damaged_files_are_the_same_or_a_clear_error(name: str) -> None:
    assert_good(name, SLOW_CASES, seed=1_000_000)


def test_a_hang_and_a_crash_of_the_reading_process_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness itself must see what it is there to see.
    FORMATS["safetensors"](tmp_path / "model")
    reader = Reader(tmp_path / "model")
    try:
        assert reader.outcome(tmp_path / "model")["outcome"] == "same"
        assert reader.outcome(tmp_path / "missing")["outcome"] == "clear error"
        assert reader.process is not None
        reader.process.kill()
        reader.process.wait()
        assert reader.outcome(tmp_path / "model")["outcome"] == "crash"
        assert reader.outcome(tmp_path / "model")["outcome"] == "same"
        monkeypatch.setattr("tests.convert.fuzz.run.SECONDS", 0.0)
        assert reader.outcome(tmp_path / "model")["outcome"] == "hang"
    finally:
        reader.close()
    assert set(GOOD) == {"same", "clear error"}
