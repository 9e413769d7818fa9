"""An opened checkpoint: its config, its tensors by name, its tokenizer. Nothing is loaded yet."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxengine.convert.errors import CheckpointError, integer
from jaxengine.convert.json_file import read_json, read_small_file
from jaxengine.convert.sentencepiece_tokenizer import needs_tokenizer_json, sentencepiece_files
from jaxengine.convert.tensors import StoredTensor, read

# What says how text becomes tokens and conversations become text, in every name that is in use.
TOKENIZER_FILE_PATTERNS = (
    *("tokenizer*", "*.tiktoken", "*.model", "*.bpe", "tekken.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*.json", "vocab*.txt", "merges.txt", "encoder.json"),
    *("normalizer.json", "*.jinja", "chat_template*", "processor_config.json"),
)
TEMPLATE_FOLDER = "additional_chat_templates"  # of chat_template.jinja: one *.jinja a name
MAX_TOKEN_ID = (1 << 31) - 1
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, whatever its format.

    Attributes:
        source: The directory, or the GGUF file.
        format: "safetensors", "pytorch_bin", "gguf" or "converted".
        hf_config: Content of config.json; rebuilt from the metadata for a GGUF file.
        tensors: Every tensor by its Hugging Face name; by our path in a converted directory.
        tokenizer_files: Gives the tokenizer as relative file name -> content; of a GGUF file they
            are rebuilt, which can fail, so this is a function.
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

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation: generation_config.json's, or config.json's without them.

        Raises:
            CheckpointError: If they are no token ids.
        """
        for name, config in (
            (GENERATION_CONFIG, self.generation_config),
            (CONFIG, self.hf_config),
        ):
            value = config.get("eos_token_id")
            if value is not None:
                values = value if isinstance(value, list) else [value]
                return tuple(
                    integer(each, self.source, f"eos_token_id of {name}", 0, MAX_TOKEN_ID)
                    for each in values
                )
        return ()

    def nbytes(self, name: str) -> int:
        """Bytes the tensor takes in its file."""
        return self.tensors[name].nbytes

    def read(self, name: str) -> np.ndarray:
        """The whole tensor: a view of the mapped file where the format allows it."""
        return read(self.tensors[name])

    def write_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer into a directory, for ``AutoTokenizer.from_pretrained``.

        config.json goes with it: where it names the model, transformers chooses the tokenizer's
        class by that, and not by what tokenizer_config.json says.
        """
        files = self.tokenizer_files()
        if needs_tokenizer_json(files):
            files = sentencepiece_files(files, self.source)
        elif self.format != "gguf":  # whose files are made for the class that they name
            files |= read_files(self.source, (CONFIG,))
        write_files(directory, files)


def read_tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files that lie in a directory, as relative name -> content.

    Raises:
        CheckpointError: If one cannot be read.
    """
    return read_files(directory, TOKENIZER_FILE_PATTERNS)


def write_sentencepiece_tokenizer(source: Path, directory: Path) -> bool:
    """Write the tokenizer of a directory that has a tokenizer.model alone into another.

    Returns:
        Whether it is such a one; if not, nothing is written.
    """
    files = read_tokenizer_files(source) if source.is_dir() else {}
    if not needs_tokenizer_json(files):
        return False
    write_files(directory, sentencepiece_files(files, source))
    return True


def read_files(directory: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Files of a directory, and of its folder of templates, as relative name -> content."""
    folder = directory / TEMPLATE_FOLDER
    paths = [*directory.iterdir(), *(folder.glob("*.jinja") if folder.is_dir() else ())]
    return {
        path.relative_to(directory).as_posix(): read_small_file(path)
        for path in sorted(paths)
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
    }


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files of relative names, which may lie in folders, into a directory."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Content of generation_config.json; {} where there is none.

    Raises:
        CheckpointError: If it is no JSON object.
    """
    path = directory / GENERATION_CONFIG
    return read_json(path) if path.exists() else {}


def config_of(directory: Path) -> dict[str, Any]:
    """Content of config.json.

    Raises:
        CheckpointError: If it is missing, or no JSON object.
    """
    try:
        return read_json(directory / CONFIG)
    except CheckpointError as error:
        if (directory / CONFIG).exists():
            raise
        raise CheckpointError(f"{error}: without it {directory} is no model") from None
