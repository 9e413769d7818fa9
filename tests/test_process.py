"""What an engine changes in its process gives way to what the user has chosen."""

import pytest

from jaxengine import process


def test_the_pool_is_reserved_unless_the_user_has_chosen_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")
    process.reserve_pool(0.9)
    assert process.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.3"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    process.reserve_pool(0.9)
    assert process.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.8875"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
