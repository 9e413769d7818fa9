"""docs/coming-from-vllm.md is what its tables say, and they are true."""

import dataclasses

import pytest

import jaxengine
from jaxengine.compat.document import FILE, document
from jaxengine.compat.names import CLASSES, COMPLETION_OUTPUT, METHODS, REQUEST_OUTPUT

PLACES = {
    "LLM": (METHODS, lambda: set(dir(jaxengine.LLM))),
    "package": (CLASSES, lambda: set(jaxengine.__all__)),
    "RequestOutput": (REQUEST_OUTPUT, lambda: _fields(jaxengine.RequestOutput)),
    "CompletionOutput": (COMPLETION_OUTPUT, lambda: _fields(jaxengine.CompletionOutput)),
}


def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def test_the_page_is_what_the_tables_say() -> None:
    assert FILE.read_text(encoding="utf-8") == document(), "run make docs"


@pytest.mark.parametrize("place", PLACES)
def test_a_name_is_there_unless_the_table_says_that_it_is_missing(place: str) -> None:
    names, found = PLACES[place]
    there = found()
    wrong = [each.name for each in names if (each.name in there) == (each.status == "missing")]
    assert wrong == []
