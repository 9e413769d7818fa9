"""The package as it is installed: its parts by name, and the checkout's own parts in a checkout."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxengine

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BESIDE = ("convert", "pallas_kernels")


def packages_on_disk() -> set[str]:
    def below(folder: str) -> set[str]:
        inits = (ROOT / folder).rglob("__init__.py")
        return {init.parent.relative_to(ROOT).as_posix().replace("/", ".") for init in inits}

    return below("jaxengine") | {f"jaxengine.{name}" for part in BESIDE for name in below(part)}


def test_every_package_on_disk_is_installed_and_nothing_else() -> None:
    listed = SETTINGS["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_on_disk())


@pytest.mark.parametrize("name", BESIDE)
def test_a_checkout_imports_its_own_parts(name: str) -> None:
    assert list(importlib.import_module(f"jaxengine.{name}").__path__) == [str(ROOT / name)]


def test_another_module_named_convert_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "convert.py").write_text("raise ImportError('the wrong one')")
    code = "import jaxengine.convert.__main__, jaxengine.pallas_kernels, sys; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert not {"convert", "pallas_kernels", "jax", "flax", "transformers"} & {*run.stdout.split()}


def test_the_package_is_a_command() -> None:
    command = [sys.executable, "-m", "jaxengine", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == jaxengine.__version__


def test_the_readme_reads_the_same_on_a_package_index() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(
        r"^\[[^]`]+\]: (.+)$", text, re.MULTILINE
    )
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    ours = SETTINGS["project"]["urls"]["Homepage"]
    files = [
        re.sub(r"^(blob|tree)/main/", "", link.removeprefix(f"{ours}/"))
        for link in links
        if link.startswith(f"{ours}/")
    ]
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []
