"""Fetches a model from the Hugging Face hub into its local cache, weights in one format only."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxengine.convert.checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    TEMPLATE_FOLDER,
    TOKENIZER_FILE_PATTERNS,
    config_of,
)
from jaxengine.convert.errors import CheckpointError

CheckConfig = Callable[[dict[str, Any]], None]

CONFIG_FILES = (CONFIG, GENERATION_CONFIG)
SAFETENSORS_FILES = ("*.safetensors", "model.safetensors.index.json")
TORCH_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# How sentence-transformers pools: beside the weights, and in folders such as 1_Pooling.
POOLING_FILES = (
    *("modules.json", "sentence_bert_config.json"),
    *("[0-9]*_*/config.json", "[0-9]*_*/model.safetensors"),
)
# Sub-folders and consolidated* hold the same weights once more, in other layouts.
LEFT_OUT = ("*/*", "consolidated*")


def is_hub_name(source: str) -> bool:
    """Whether the text reads as "organisation/model"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def fetch(name: str, revision: str | None = None, check_config: CheckConfig | None = None) -> Path:
    """The directory of the model in the local cache, fetched if it is not there.

    Args:
        name: "organisation/model".
        revision: Branch, tag or commit; None is the main branch.
        check_config: Raises if a model of this config.json cannot be used; called before the
            tokenizer and the weights are fetched.

    Raises:
        CheckpointError: If the hub cannot be reached or has no such model for this user.
    """
    directory = _snapshot(name, revision, CONFIG_FILES)
    config = config_of(directory)
    if check_config is not None:
        check_config(config)
    # The branch may move meanwhile: the rest is to be of the same commit.
    commit = directory.name if directory.parent.name == "snapshots" else revision
    # Safetensors first and pickles only where there are none: a hub model often has both.
    _snapshot(name, commit, (*TOKENIZER_FILE_PATTERNS, *SAFETENSORS_FILES), LEFT_OUT)
    if not any(directory.glob("*.safetensors")):
        _snapshot(name, commit, TORCH_FILES, LEFT_OUT)
    _snapshot(name, commit, (f"{TEMPLATE_FOLDER}/*.jinja", *POOLING_FILES))
    return directory


def _snapshot(
    name: str, revision: str | None, allowed: tuple[str, ...], left_out: tuple[str, ...] = ()
) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(allowed),
                ignore_patterns=list(left_out) or None,
            )
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"the model {name!r} is gated: ask for access on its hub page, then set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"the hub has no model {name!r} that you may read: check the name, set HF_TOKEN if it "
            "is private, or give a local directory"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"the model {name!r} has no branch, tag or commit {revision!r} at the hub"
        ) from None
    # Its network library, and with it what it raises, changes from version to version.
    except Exception as error:
        raise CheckpointError(
            f"{name!r} is no local path, and the hub could not be reached to fetch it. Give a "
            "local directory or GGUF file; or fix the network (HF_ENDPOINT names a mirror); or, if "
            "the model was fetched before, set HF_HUB_OFFLINE=1 to use the cached files only. "
            f"The hub's own error: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
