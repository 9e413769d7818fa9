"""What an LLM reads of a model besides its weights: its tokenizer and its sampling defaults."""

import json
import tempfile
from pathlib import Path
from typing import Any

from jaxengine.config import EngineConfig
from jaxengine.text.tokenizer import Tokenizer, load_tokenizer
from jaxengine.weights import Checkpoint, open_model, write_sentencepiece_tokenizer

# Fields of generation_config.json that are sampling parameters too.
_DEFAULT_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


def read_sampling_defaults(config: EngineConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the sampling parameters of the generation config that the engine is to follow.

    Raises:
        ValueError: If the one named cannot be read.
    """
    known: dict[str, dict[str, Any]] = {"auto": checkpoint.generation_config, "vllm": {}}
    found = known.get(config.generation_config)
    if found is None:
        found = _read_generation_config(config.generation_config)
    found = {**found, **config.override_generation_config}
    values = {name: found[name] for name in _DEFAULT_FIELDS if found.get(name) is not None}
    if "max_new_tokens" in values:
        values["max_tokens"] = values.pop("max_new_tokens")
    return values


def _read_generation_config(directory: str) -> dict[str, Any]:
    file = Path(directory).expanduser() / "generation_config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"generation_config {directory!r} is neither 'auto' nor 'vllm' nor a directory with a "
            f"generation_config.json that can be read: {error}"
        ) from None


def read_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer:
    """Load the tokenizer named, or the one that lies with the model.

    Raises:
        ValueError: If it cannot be loaded.
    """
    generation_config = {"eos_token_id": checkpoint.eos_token_ids}
    named = config.tokenizer
    with tempfile.TemporaryDirectory(prefix="jaxengine-tokenizer-") as directory:
        if named is None or named.endswith(".gguf"):
            source = checkpoint if named is None else open_model(named)
            source.write_tokenizer(Path(directory))
        elif not write_sentencepiece_tokenizer(Path(named), Path(directory)):
            return load_tokenizer(
                named, generation_config=generation_config, revision=config.tokenizer_revision
            )
        return load_tokenizer(directory, generation_config=generation_config)
