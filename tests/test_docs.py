"""What the documents show runs, and what they name exists."""

import re
from pathlib import Path

import numpy as np
import pytest
from jaxengine.convert import families

from jaxengine import ModelRegistry
from tests.helpers import hf_logits, our_logits, save_tiny_model
from tests.models import supported_models

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
)


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def code_blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(document), re.DOTALL | re.MULTILINE)


def test_the_model_added_in_the_document_equals_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRegistry, "_models", dict(ModelRegistry._models))
    monkeypatch.setattr(families, "_families", dict(families._families))
    (code,) = code_blocks("docs/adding-a-model.md", "python")
    exec(compile(code, "docs/adding-a-model.md", "exec"), {"__name__": "outside_package"})
    model = save_tiny_model(tmp_path, "Jais2")
    tokens = [int(token) for token in np.random.default_rng(0).integers(3, 128, 40)]
    np.testing.assert_allclose(our_logits(tmp_path, tokens), hf_logits(model, tokens), atol=1e-4)


def test_the_supported_models_are_those_of_the_registry_and_the_tests() -> None:
    # python -m tests.models.supported_models > docs/supported-models.md
    assert read("docs/supported-models.md") == supported_models.document()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_only_files_that_exist(document: str) -> None:
    named = re.findall(r"`((?:\w[\w.-]*/)+[\w.-]+\.(?:py|md|json|toml))`", read(document))
    named += re.findall(r"\]\(((?!http|#)[^)#]+)[^)]*\)", read(document))
    bases = (ROOT, (ROOT / document).parent, ROOT / "jaxengine")
    assert [name for name in named if not any((base / name).exists() for base in bases)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_only_make_targets_that_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)\b", "\n".join(_code(document)))) <= targets


def _code(document: str) -> list[str]:
    return code_blocks(document, "bash") + re.findall(r"`([^`\n]+)`", read(document))


def test_the_file_tree_of_the_readme_names_every_module() -> None:
    (tree,) = [block for block in code_blocks("README.md", "text") if "pyproject.toml" in block]
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("jaxengine", "pallas_kernels", "convert")
        for path in (ROOT / package).rglob("*.py")
        if path.stat().st_size  # not an empty __init__.py
    }
    assert sorted(modules - set(_tree_files(tree))) == []


def test_the_file_tree_of_the_readme_names_nothing_else() -> None:
    (tree,) = [block for block in code_blocks("README.md", "text") if "pyproject.toml" in block]
    assert [file for file in _tree_files(tree) if not (ROOT / file).exists()] == []


def _tree_files(tree: str) -> list[str]:
    """Paths of a tree drawn with two spaces a level; two spaces also part names and comments."""
    folders: list[str] = []
    files: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r" {2,}", line.strip()):
            if name.endswith("/"):
                folders[depth:] = [name]
            elif re.fullmatch(r"\w+\.(py|toml)|Makefile", name):
                files.append("".join(folders[:depth]) + name)
    return files
