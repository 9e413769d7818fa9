"""Writes docs/supported-models.md from the registry and from what the tests hold.

python -m tests.models.supported_models > docs/supported-models.md
"""

from collections.abc import Iterable

from jaxengine.convert.families import built_in_families
from jaxengine.convert.families.family import Family

from tests.helpers import TRANSFORMERS_NAMES
from tests.models import (
    family_cases,
    numpy_cases,
    published,
    test_hf_parity,
    test_multimodal,
)
from tests.models.engine_cases import ENGINE_CASES
from tests.pooling import encoder_cases

HEAD = """\
# Supported models

Written by `python -m tests.models.supported_models` from the registry and the tests; a test holds
it to them. An architecture is the name in `architectures` of a checkpoint's config.json; of several
in a row any is read. [models.md](models.md) says how a model is described,
[adding-a-model.md](adding-a-model.md) how to add one. No code of a checkpoint is ever run.

What is checked, beside what holds for all of them (each parameter is filled exactly once):

- **logits**: a tiny random checkpoint has the logits of transformers' class (T) within 1e-4 in
  float32 at every position, or of an independent version in numpy (N); the number is of options
  tried.
  Of an encoder ([pooling.md](pooling.md)) it is the last layer's output, or the scores of labels.
- **names**: every tensor of a published size is read, and every parameter has its tensor.
- **engine**: token by token through the paged cache, in chunks and with preemption, on one device
  and with 2 shards of each of 2 stages, the tokens of a whole prefill.

| architectures | models | logits | names | engine |
|---|---|---|---|---|
"""


def document() -> str:
    """The whole file."""
    return HEAD + "".join(_row(family) for family in built_in_families())


def _row(family: Family) -> str:
    names = ", ".join(f"`{name}`" for name in family.architectures)
    logits = [
        f"{letter} {count}"
        for letter, count in (
            ("T", _count(family, _transformers_cases())),
            ("N", _count(family, (name for name, _ in numpy_cases.TINY.values()))),
        )
        if count
    ]
    sizes = [
        size
        for size, (name, _) in {**published.PUBLISHED, **numpy_cases.PUBLISHED}.items()
        if _architecture(name) in family.architectures
    ]
    engine = "yes" if _count(family, ENGINE_CASES.values()) else ""
    cells = (names, family.examples, ", ".join(logits), ", ".join(sizes), engine)
    return f"| {' | '.join(cells)} |\n"


def _transformers_cases() -> list[str]:
    cases = [*family_cases.CASES.values(), *test_hf_parity.CASES.values()]
    names = [_architecture(family) for family, _ in cases]
    names += [name for name, _ in encoder_cases.CASES.values()]
    return names + [f"{family}ForConditionalGeneration" for family in test_multimodal.CASES]


def _architecture(name: str) -> str:
    """The architecture of a family's short name, as transformers has it."""
    if name.endswith(("ForCausalLM", "Model")):
        return name
    return TRANSFORMERS_NAMES.get(name, f"{name}ForCausalLM")


def _count(family: Family, architectures: Iterable[str]) -> int:
    return sum(architecture in family.architectures for architecture in architectures)


if __name__ == "__main__":
    print(document(), end="")
