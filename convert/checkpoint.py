"""An opened checkpoint: its config, its tensors by name, its tokenizer. Nothing is loaded yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxengine.convert.tensors import StoredTensor, read

TOKENIZER_FILE_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, whatever its format.

    Attributes:
        source: The directory, or the GGUF file.
        format: "safetensors", "pytorch_bin", "gguf" or "converted".
        hf_config: Content of config.json; rebuilt from the metadata for a GGUF file.
        tensors: Every tensor by its Hugging Face name; by our path in a converted directory.
        tokenizer_files: Gives the tokenizer as file name -> content; of a GGUF file they are
            rebuilt, which can fail, so this is a function.
        generation_config: Content of generation_config.json; {} where there is none.
    """

    source: Path
    format: str
    hf_config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    tokenizer_files: Callable[[], dict[str, bytes]]
    generation_config: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the file."""
        return list(self.tensors)

    def nbytes(self, name: str) -> int:
        """Bytes the tensor takes in its file."""
        return self.tensors[name].nbytes

    def read(self, name: str) -> np.ndarray:
        """The whole tensor: a view of the mapped file where the format allows it."""
        return read(self.tensors[name])

    def write_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer files into a directory, for ``AutoTokenizer.from_pretrained``."""
        for name, content in self.tokenizer_files().items():
            (directory / name).write_bytes(content)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: If the file is not there, is not JSON, or does not hold an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def read_tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The tokenizer files that lie in a directory, as name -> content."""
    paths = (directory / name for name in TOKENIZER_FILE_NAMES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}
