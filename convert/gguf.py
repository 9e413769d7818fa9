"""A GGUF file, or all parts of a split one, seen as a Hugging Face checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import Keys
from jaxengine.convert.checkpoint import Checkpoint
from jaxengine.convert.errors import CheckpointError, check_unique, integer, shown
from jaxengine.convert.gguf_config import hf_config
from jaxengine.convert.gguf_file import GGUFFile, QuantisedTensor, read_gguf
from jaxengine.convert.gguf_metadata import Metadata
from jaxengine.convert.gguf_rope import ROPE_TENSORS
from jaxengine.convert.gguf_special_tokens import generation_config
from jaxengine.convert.gguf_tokenizer import tokenizer_files
from jaxengine.convert.tensors import MappedTensor, StoredTensor, ZeroTensor

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
# llama.cpp takes each bias where it finds it; our rules want all of a group, or none.
BIAS_GROUPS = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up", "ffn_down"))

# As llama.cpp's gguf-split names parts: counted from 1, the count in every name.
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file; of a split one, any part.

    Raises:
        CheckpointError: If the file is damaged, a part of it is missing, or its model is not
            supported.
    """
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path} is a file but no .gguf: give the model's directory instead")
    file = _read_all_parts(path)
    config = hf_config(file)
    metadata = Metadata(file.path, file.metadata, file.metadata[Keys.General.ARCHITECTURE])
    return Checkpoint(
        source=file.path,
        format="gguf",
        hf_config=config,
        tensors=_hf_tensors(file, config),
        tokenizer_files=lambda: tokenizer_files(metadata),
        generation_config=generation_config(metadata),
    )


def first_part(paths: list[Path]) -> Path | None:
    """The one GGUF file of a directory, or the first part of its one split file; else None."""
    stems = {_stem(path) for path in paths}
    return min(paths) if len(stems) == 1 else None


def _stem(path: Path) -> str:
    match = PART_NAME.fullmatch(path.name)
    return match["stem"] if match else path.name


def _read_all_parts(path: Path) -> GGUFFile:
    """The file, with the tensors of all its parts; the metadata is the first part's."""
    given = read_gguf(path)
    count = _split_number(given, Keys.Split.LLM_KV_SPLIT_COUNT, default=1)
    if count <= 1:
        return given
    parts = [
        given if each == path else _read_part(each, path, count)
        for each in _part_paths(path, count)
    ]
    for number, part in enumerate(parts):
        found = _split_number(part, Keys.Split.LLM_KV_SPLIT_NO, default=0)
        found_count = _split_number(part, Keys.Split.LLM_KV_SPLIT_COUNT, default=1)
        if (found, found_count) != (number, count):
            raise CheckpointError(
                f"{part.path} says that it is part {found + 1} of {found_count}, its name that it "
                f"is {number + 1} of {count}: fetch it again"
            )
    names = [name for part in parts for name in part.tensors]
    check_unique(names, path, "tensor")
    total = _split_number(parts[0], Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, default=len(names))
    if total != len(names):
        raise CheckpointError(
            f"{path}: its {count} parts hold {len(names)} tensors, "
            f"{Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT} is {total}: fetch them again"
        )
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    return GGUFFile(parts[0].path, parts[0].metadata, tensors)


def _split_number(file: GGUFFile, key: str, default: int) -> int:
    return integer(file.metadata.get(key, default), file.path, key, 0, 1 << 31)


def _part_paths(path: Path, count: int) -> list[Path]:
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, but is not named like one: expected "
            f"NAME-00001-of-{count:05}.gguf. Give it the name that it had, or join the parts with "
            "llama.cpp's `llama-gguf-split --merge`"
        )
    return [
        path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]


def _read_part(part: Path, given: Path, count: int) -> GGUFFile:
    if not part.is_file():
        raise CheckpointError(
            f"{part} is missing: {given.name} is one of {count} parts, and all must lie in one "
            "directory. Fetch it too"
        )
    return read_gguf(part)


def _hf_tensors(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    # llama.cpp reorders the rows of q and k only where it also rotates interleaved pairs.
    is_permuted = file.metadata[Keys.General.ARCHITECTURE] == "llama"
    if is_permuted and "partial_rotary_factor" in config:
        raise CheckpointError(
            f"{file.path} rotates only a part of each head: not supported for architecture llama"
        )
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in (file.tensors | _missing_biases(file, config)).items():
        if name in ROPE_TENSORS:
            continue
        hf_name = _hf_name(name)
        if is_permuted and re.search(r"self_attn\.[qk]_proj\.", hf_name):
            tensor = _interleaved(file.path, hf_name, tensor, config["head_dim"])
        elif isinstance(tensor, (MappedTensor, QuantisedTensor, ZeroTensor)):
            tensor = replace(tensor, name=hf_name)
        tensors[hf_name] = tensor
    check_unique((_hf_name(name) for name in file.tensors), file.path, "tensor")
    return tensors


def _missing_biases(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Zeros for each bias that is not there while another one of its group is, in any layer."""
    zeros: dict[str, StoredTensor] = {}
    for group in BIAS_GROUPS:
        endings = tuple(f".{stem}.bias" for stem in group)
        if not any(name.endswith(endings) for name in file.tensors):
            continue
        for layer in range(config["num_hidden_layers"]):
            for stem in group:
                name = f"blk.{layer}.{stem}.bias"
                weight = file.tensors.get(f"blk.{layer}.{stem}.weight")
                if name not in file.tensors and weight is not None and weight.shape:
                    zeros[name] = ZeroTensor(name, weight.shape[:1])
    return zeros


def _hf_name(name: str) -> str:
    """HF's name of a GGUF tensor; the name itself if there is none, which a rule then reports."""
    layer = re.match(r"blk\.(\d{1,6})\.", name)
    stem, _, kind = name.rpartition(".")
    if layer:
        stem = "blk.{i}." + stem[layer.end() :]
    if stem not in NAMES:
        return name
    return f"{NAMES[stem]}.{kind}".replace("{i}", layer.group(1) if layer else "")


def _interleaved(path: Path, name: str, stored: StoredTensor, head_dim: int) -> StoredTensor:
    if head_dim % 2 or not stored.shape or stored.shape[0] % head_dim:
        raise CheckpointError(
            f"{path}: tensor {shown(name)} of shape {stored.shape} is not made of heads of "
            f"{head_dim} rows: the file is damaged, fetch it again"
        )
    return InterleavedTensor(name, stored, head_dim)


@dataclass(frozen=True)
class InterleavedTensor:
    """A q or k projection in llama.cpp's row order, given out in Hugging Face's.

    llama.cpp rotates neighbouring rows of a head, HF row j with row j + H/2. The file's rows of
    a head are therefore HF's rows 0, H/2, 1, H/2 + 1, ...
    """

    name: str
    stored: StoredTensor
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in both orders."""
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the stored tensor."""
        return self.stored.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stored.nbytes

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` in HF's order; whole heads are read for it."""
        H = self.head_dim
        first, last = start // H * H, -(-stop // H) * H
        stored = self.stored.rows(first, min(last, self.shape[0]))
        heads = stored.reshape(-1, H // 2, 2, *stored.shape[1:]).swapaxes(1, 2)
        return heads.reshape(stored.shape)[start - first : stop - first]
