"""Compiled steps kept on disk between runs.

jax's own compilation cache is asked with a lowered program, and tracing and lowering a step takes
longer than loading the result: 0.3 to 0.5 s a step, one after the other. This one is asked with
what the program is made from: the source code, the versions, the devices, the model, the shape.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import math
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.experimental import serialize_executable

from jaxengine.engine.device.compiler_options import CompilerOptions

logger = logging.getLogger(__name__)

PACKAGES = ("jaxengine", "jaxengine.pallas_kernels")
LIBRARIES = ("jax", "flax", "numpy")  # what traces and lowers; XLA names itself
# Importing it says where the library is that a compiled Mosaic kernel calls. Who traces such a
# kernel has imported it; who only loads one has not, and fails: "Failed to lookup host symbol".
MOSAIC_RUNTIME = "jax.experimental.mosaic.gpu"
# Every change of the source names all programs anew: who works on it would fill the disk.
MAX_BYTES = 4 << 30
TRACING_FLAGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")


class ProgramCache:
    """A directory of compiled programs, of ``MAX_BYTES`` at most: what was used last stays.

    Loading one runs what the file says, as with any compilation cache: the directory must be as
    trusted as the program itself.

    Args:
        directory: Made when the first program is stored.
        devices: Those that the programs run on, all of this process.
        facts: What all of the programs depend on, beside the source code, the versions, the
            devices and XLA's flags; each must print the same in every process.
    """

    def __init__(
        self, directory: Path, devices: Sequence[jax.Device], facts: Sequence[object]
    ) -> None:
        self._directory = directory
        self._devices = list(devices)
        self._has_failed = False
        if devices[0].platform == "gpu":
            importlib.import_module(MOSAIC_RUNTIME)
        self._digest = _digest(
            source_digest(),
            [importlib.metadata.version(name) for name in LIBRARIES],
            devices[0].client.platform_version,
            [(device.id, device.device_kind) for device in devices],
            os.environ.get("XLA_FLAGS"),
            [jax.config.values[name] for name in TRACING_FLAGS],
            *facts,
        )

    def path(self, facts: Sequence[object]) -> Path:
        """Where a program lies that depends on ``facts`` too."""
        return self._directory / f"{_digest(self._digest, *facts)}.step"

    def load(self, facts: Sequence[object]) -> jax.stages.Compiled | None:
        """Return the program that depends on ``facts``; None if it is not there or damaged."""
        return self._read(self.path(facts))

    def store(self, facts: Sequence[object], program: jax.stages.Compiled) -> None:
        """Keep a program; if that fails (a full or read-only disk), say so and try no more.

        Most of it, XLA writing a program down, holds the interpreter: 0.1 to 0.3 s.
        """
        if not self._has_failed:
            self._write(self.path(facts), program)
            self._make_room()

    def _make_room(self) -> None:
        """Delete what was not used for longest. Another process may be doing the same."""
        files = []
        with contextlib.suppress(OSError):
            for path in self._directory.glob("*.step"):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) - MAX_BYTES
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            excess -= size
            with contextlib.suppress(OSError):
                path.unlink()

    def _read(self, path: Path) -> jax.stages.Compiled | None:
        try:
            executable, in_tree, out_tree = pickle.loads(path.read_bytes())
            with contextlib.suppress(OSError):  # another's directory, perhaps
                path.touch()
            return serialize_executable.deserialize_and_load(
                executable,
                in_tree,
                out_tree,
                backend=self._devices[0].client,
                execution_devices=self._devices,
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # whatever a damaged file leads to: it can be made again
            logger.warning("%s cannot be loaded (%s): compiling the step anew", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def _write(self, path: Path, program: jax.stages.Compiled) -> None:
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            serialized = pickle.dumps(serialize_executable.serialize(program))
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(serialized)
            part.replace(path)  # at once: another process may be reading
        except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            self._has_failed = True
            logger.warning("compiled steps cannot be kept in %s: %s", self._directory, error)
            with contextlib.suppress(OSError):
                part.unlink()


class _Hits(threading.local):
    """How often jax's own cache had what this thread was compiling."""

    count = 0


_hits = _Hits()


def compile_lowered(
    lowered: jax.stages.Lowered, options: CompilerOptions
) -> tuple[jax.stages.Compiled, bool]:
    """Compile a program.

    Returns:
        The program, and whether it may be stored: what jax's cache gave was serialized already,
        and not every backend can do that twice.
    """
    num_hits = _hits.count
    program = lowered.compile(options)
    return program, _hits.count == num_hits


@contextlib.contextmanager
def jax_cache_only_read() -> Iterator[None]:
    """Meanwhile jax's own cache takes in nothing: it would hold all that is kept here again.

    Writing 27 steps down a second time cost a start 7 s, as each holds the interpreter.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _note_event(event: str, **_: object) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _hits.count += 1


jax.monitoring.register_event_listener(_note_event)


def cache_directory() -> Path | None:
    """Return where compiled steps are kept: within jax's cache; None if that is switched off."""
    directory = jax.config.values["jax_compilation_cache_dir"]
    if directory is None or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    return Path(directory) / "steps"


def _digest(*facts: object) -> str:
    return hashlib.sha256("\n".join(map(repr, facts)).encode()).hexdigest()


@functools.cache
def source_digest() -> str:
    """Hash of all files that have a say in what a step computes."""
    digest = hashlib.sha256()
    for name in PACKAGES:
        (directory,) = importlib.import_module(name).__path__
        for path in sorted(Path(directory).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(f"{path.relative_to(directory)}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
