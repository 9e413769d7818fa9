"""Opens and reads checkpoints, one a line of standard input, in a process with bounded memory.

For each it writes a line of JSON: the outcome. What the process cannot report (it hangs, it dies)
the parent sees.
"""

import hashlib
import json
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

from jaxengine.convert import check_supported, open_checkpoint, parameters

from jaxengine.model_config import ModelConfig

MEMORY_BYTES = 2 * 2**30  # beside what the libraries take at their import
TEXTS = ["Hello world 12", "é 東京 \U0001f680", "<s> a</s>"]


def read_all(path: Path) -> dict[str, str]:
    """Everything an engine takes from a checkpoint: config, end tokens, weights, tokenizer.

    Returns:
        Of each parameter its dtype, shape and hash.
    """
    source = path / "model.gguf"
    checkpoint = open_checkpoint(source if source.exists() else path, check_config=check_supported)
    ModelConfig.from_hf(checkpoint.hf_config)
    _ = checkpoint.eos_token_ids
    digests = {}
    for parameter in parameters(checkpoint):
        values = parameter.load()
        # A view of a file is hashed without a copy.
        digest = hashlib.sha1(values.tobytes() if values.size else b"", usedforsecurity=False)
        digests[parameter.path] = f"{parameter.dtype}{parameter.shape}{digest.hexdigest()}"
    if checkpoint.format == "gguf" or (path / "tokenizer.json").exists():
        _use_tokenizer(checkpoint)
    return digests


def _use_tokenizer(checkpoint: Any) -> None:
    from jaxengine.text.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        checkpoint.write_tokenizer(Path(directory))
        tokenizer = load_tokenizer(directory, generation_config={})
        for token_ids in tokenizer.encode_batch(TEXTS):
            tokenizer.decode(token_ids)
            tokenizer.detokenizer([]).append(token_ids)


def outcome(path: Path, expected: dict[str, str] | None) -> dict[str, Any]:
    """What became of one checkpoint."""
    try:
        found = read_all(path)
    except MemoryError:
        return {"outcome": "memory"}
    except ValueError as error:
        text = str(error)
        names = (path.name, "config.json", "tokenizer", "model.gguf")
        is_clear = type(error).__module__ != "builtins" or type(error) is ValueError
        if is_clear and any(name in text for name in names) and len(text) < 4000:
            return {"outcome": "clear error", "text": text[:300]}
        return {"outcome": "unclear error", "text": f"{type(error).__name__}: {text[:300]}"}
    except BaseException as error:
        return {"outcome": "raw exception", "text": f"{type(error).__name__}: {str(error)[:300]}"}
    # A config that ties the embeddings leaves the head out, as it may; nothing else may differ.
    is_same = expected is None or found.items() <= expected.items()
    return {"outcome": "same" if is_same else "other weights", "found": found}


def main() -> None:
    """Serve until standard input ends. The first checkpoint is the undamaged one."""
    warnings.simplefilter("ignore")
    # What a library prints, also in Rust, must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    expected: dict[str, str] | None = None
    for line in sys.stdin:
        result = outcome(Path(json.loads(line)["path"]), expected)
        found = result.pop("found", None)
        if expected is None:
            assert result["outcome"] == "same", result
            expected = found
            _limit_memory()  # now that all libraries are imported
        print(json.dumps(result), file=answers, flush=True)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
