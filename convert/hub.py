"""Fetches a model from the Hugging Face hub into its local cache, weights in one format only."""

from __future__ import annotations

import re
from pathlib import Path

from jaxengine.convert.checkpoint import TOKENIZER_FILE_NAMES

SMALL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILE_NAMES)


def is_hub_name(source: str) -> bool:
    """Whether the text reads as "organisation/model"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def fetch(name: str, revision: str | None = None) -> Path:
    """The directory of the model in the local cache, fetched if it is not there.

    Args:
        name: "organisation/model".
        revision: Branch, tag or commit; None is the main branch.

    Raises:
        ValueError: If the hub cannot be reached or has no such model for this user.
    """
    # Safetensors first and pickles only where there are none: a hub model often has both.
    directory = _snapshot(name, revision, ("*.safetensors", "model.safetensors.index.json"))
    if not any(directory.glob("*.safetensors")):
        directory = _snapshot(
            name, revision, ("pytorch_model*.bin", "pytorch_model.bin.index.json")
        )
    return directory


def _snapshot(name: str, revision: str | None, weights: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*SMALL_FILES, *weights],
                # Sub-folders and consolidated* hold the same weights once more, in other layouts.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except errors.GatedRepoError:
        raise ValueError(
            f"the model {name!r} is gated: ask for access on its hub page, then set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"the hub has no model {name!r} that you may read: check the name, set HF_TOKEN if it "
            "is private, or give a local directory"
        ) from None
    # Its network library, and with it what it raises, changes from version to version.
    except Exception as error:
        raise ValueError(
            f"{name!r} is no local path, and the hub could not be reached to fetch it "
            f"({error!r:.200}). Give a local directory or GGUF file; or fix the network "
            "(HF_ENDPOINT names a mirror); or, if the model was fetched before, set "
            "HF_HUB_OFFLINE=1 to use the cached files only."
        ) from error
