"""docs/coming-from-vllm.md, made from the tables: ``python -m jaxengine.compat.document``."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxengine.compat.engine_args import ROWS
from jaxengine.compat.names import (
    CLASSES,
    COMPLETION_OUTPUT,
    METHODS,
    OTHER_DEFAULTS,
    OUR_OWN,
    REQUEST_OUTPUT,
    SAMPLING_NOTES,
    Name,
)
from jaxengine.compat.sampling_fields import FORMER_FIELDS
from jaxengine.config import EngineConfig
from jaxengine.sampling_params import SamplingParams

FILE = Path(__file__).parents[2] / "docs" / "coming-from-vllm.md"
HEAD = """# Coming from vLLM

Scripts for vLLM's offline API run with the import renamed:

```python
from jaxengine import LLM, SamplingParams  # from vllm import LLM, SamplingParams
```

For a library that imports `vllm` by itself (lm-evaluation-harness, LangChain, LlamaIndex, trl),
three lines before it answer its imports:

```python
from jaxengine.compat import vllm_modules

vllm_modules.install()
```

Below stands every argument, method and field of vLLM 0.33, and of what it had once and scripts
still give. *Same*: name, meaning and default are vLLM's. *Accepted*: any value is taken and makes
no difference to results, with one warning if it asks for something. *Refused*: any value but the
default is an error that says what to do instead. This page is made from the tables that the code
itself uses (`make docs`).
"""


def document() -> str:
    """Return the page."""
    sections = [
        HEAD,
        "## Arguments of `LLM(...)`, `EngineArgs` and the command line\n\n"
        "The flag of `some_name` is `--some-name` or `--some_name`; `None` is every default.\n\n"
        + _table(("argument", "here", "what is other"), _arguments()),
        "## Methods of `LLM`\n\n" + _names(METHODS),
        "## `SamplingParams`\n\n" + _table(("field", "here", "what is other"), _sampling()),
        "## `RequestOutput`\n\n" + _names(REQUEST_OUTPUT),
        "## `CompletionOutput`\n\n" + _names(COMPLETION_OUTPUT),
        "## Classes of the package\n\n" + _names(CLASSES),
    ]
    return "\n".join(sections)


def _arguments() -> list[tuple[str, str, str]]:
    ours = [
        (field.name, "differs", OTHER_DEFAULTS[field.name])
        if field.name in OTHER_DEFAULTS
        else (field.name, "ours alone" if field.name in OUR_OWN else "same", "")
        for field in dataclasses.fields(EngineConfig)
    ]
    words = {"ignored": "accepted", "refused": "refused", "translated": "translated"}
    return sorted([*ours, *((row.name, words[row.kind], row.note) for row in ROWS)])


def _sampling() -> list[tuple[str, str, str]]:
    ours = [
        (f.name, "differs" if f.name in SAMPLING_NOTES else "same", SAMPLING_NOTES.get(f.name, ""))
        for f in dataclasses.fields(SamplingParams)
        if f.repr
    ]
    return sorted([*ours, *((each.name, "refused", each.remedy) for each in FORMER_FIELDS)])


def _names(names: Sequence[Name]) -> str:
    rows = ((each.name, each.status, each.note) for each in names)
    return _table(("name", "here", "what is other"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, str, str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [f"| `{name}` | {status} | {note} |" for name, status, note in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
