"""Checkpoint -> sharded device arrays, one tensor at a time.

Every device reads only its share. Nothing here knows a family: names come from the model, tensors
from ``convert``, and the two must agree to the last parameter.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jaxengine import convert
from jaxengine.convert import Checkpoint, Parameter
from jaxengine.convert.checkpoint import read_tokenizer_files, write_sentencepiece_tokenizer
from jaxengine.convert.json_file import read_json
from jaxengine.convert.overrides import Overrides, override_config

__all__ = ["Checkpoint", "ParamSpec", "Params", "load_params", "merge_params", "open_model",
           "param_specs", "place", "random_params", "write_sentencepiece_tokenizer"]  # fmt: skip

Params = dict[str, jax.Array]
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter that a model declares.

    Attributes:
        shape: Shape in memory.
        dtype: Type in memory.
        spec: How it is cut.
        init: What a dummy one holds, "normal", "ones" or "zeros".
        num_in_axes: Axes that stand first in memory and last in a checkpoint.
        num_kv_heads: Of a fused [K, G + 2, ...], the KV heads that a checkpoint has: held more
            often, each is repeated with its share of the queries. None for all else.
    """

    shape: tuple[int, ...]
    dtype: Any
    spec: P
    init: str
    num_in_axes: int = 0
    num_kv_heads: int | None = None

    @property
    def rolled_shape(self) -> tuple[int, ...]:
        """Shape with the axes in a checkpoint's order."""
        return self.shape[self.num_in_axes :] + self.shape[: self.num_in_axes]

    @property
    def kv_repeats(self) -> int:
        """How often each KV head of a checkpoint is held."""
        return 1 if self.num_kv_heads is None else self.rolled_shape[0] // self.num_kv_heads

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """Shape that a checkpoint gives it."""
        if self.kv_repeats == 1:
            return self.rolled_shape
        _, width, *rest = self.rolled_shape
        return (self.num_kv_heads or 1, (width - 2) * self.kv_repeats + 2, *rest)

    @property
    def num_bytes(self) -> int:
        """Bytes over all shards."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def abstract(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """The parameter as a shape, to compile with before it is loaded."""
        sharding = NamedSharding(mesh, self.spec)
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=sharding)


def open_model(
    source: str | Path,
    load_format: str = "auto",
    revision: str | None = None,
    hf_overrides: Overrides | None = None,
) -> Checkpoint:
    """Open a model for reading; with ``load_format="dummy"`` a directory's config is enough.

    Args:
        source: Hub name, HF directory, GGUF file or converted directory.
        load_format: Which of ``LOAD_FORMATS`` it must be.
        revision: Branch, tag or commit of a hub model.
        hf_overrides: Fields that replace those of config.json, for all that read it.

    Raises:
        ValueError: If it cannot be found, is damaged, or is not of the format asked for.
    """

    def check(config: dict[str, Any]) -> None:
        convert.check_supported(override_config(config, hf_overrides))

    checkpoint = _open(source, load_format, revision, check)
    return dataclasses.replace(
        checkpoint, hf_config=override_config(checkpoint.hf_config, hf_overrides)
    )


def _open(
    source: str | Path,
    load_format: str,
    revision: str | None,
    check: Callable[[dict[str, Any]], None],
) -> Checkpoint:
    if load_format == "dummy":
        directory = Path(source).expanduser()
        if not (directory / "config.json").is_file():
            raise ValueError(f"load_format 'dummy' needs {directory / 'config.json'}: not found")
        return _config_only(directory)
    checkpoint = convert.open_checkpoint(source, revision, check)
    if load_format not in ("auto", _LOAD_FORMATS[checkpoint.format]):
        raise ValueError(
            f"{source} holds {checkpoint.format} weights, not {load_format!r}: use "
            "--load-format auto"
        )
    return checkpoint


def _config_only(directory: Path) -> Checkpoint:
    """A checkpoint without tensors, for random weights."""
    return Checkpoint(
        source=directory,
        format="dummy",
        hf_config=read_json(directory / "config.json"),
        tensors={},
        tokenizer_files=lambda: read_tokenizer_files(directory),
        generation_config={},
    )


_LOAD_FORMATS = {
    "safetensors": "safetensors",
    "pytorch_bin": "pt",
    "gguf": "gguf",
    "converted": "converted",
}


def param_specs(build_model: Callable[[], nnx.Module]) -> tuple[Any, dict[str, ParamSpec]]:
    """Build a model without memory; return its graph definition and its parameters by dotted path.

    ``merge_params`` turns both and the arrays into a module again.
    """
    graphdef, state = nnx.split(nnx.eval_shape(build_model))
    specs = {}
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        metadata = variable.get_metadata()
        specs[".".join(map(str, path))] = ParamSpec(
            value.shape,
            value.dtype,
            metadata["spec"],
            metadata["init"],
            metadata["num_in_axes"],
            metadata["num_kv_heads"],
        )
    return (graphdef, state), specs


def merge_params(definition: Any, params: dict[str, jax.Array]) -> Any:
    """Put arrays into the model that ``param_specs`` has taken apart (used while tracing)."""
    graphdef, state = definition
    flat = [
        (path, variable.replace(params[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def load_params(
    checkpoint: Checkpoint,
    specs: dict[str, ParamSpec],
    mesh: Mesh,
    *,
    show_progress: bool = True,
) -> Params:
    """Read a stage's parameters straight to their devices.

    Args:
        checkpoint: From ``convert.open_checkpoint``.
        specs: What the model (or its stage) declares; parameters of other stages are skipped.
        mesh: Devices of the stage.
        show_progress: Whether to draw a progress bar of bytes.

    Raises:
        ValueError: If the checkpoint lacks a parameter or has one of another shape.
    """
    params: Params = {}
    total = sum(spec.num_bytes for spec in specs.values())
    dtype = str(np.dtype(next(iter(specs.values())).dtype))
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not show_progress
    ) as bar:
        for source in convert.parameters(checkpoint, dtype):
            if (spec := specs.get(source.path)) is None:
                continue
            params[source.path] = place(source, spec, mesh)
            bar.update(spec.num_bytes)
    if missing := sorted(specs.keys() - params.keys()):
        raise ValueError(f"the checkpoint lacks {len(missing)} parameters: {', '.join(missing)}")
    return {path: params[path] for path in specs}


def place(source: Parameter, spec: ParamSpec, mesh: Mesh) -> jax.Array:
    """Read a parameter straight to its devices.

    Raises:
        ValueError: If it has another shape than the model's.
    """
    if source.shape != spec.checkpoint_shape:
        raise ValueError(
            f"{source.path} has shape {source.shape}, the model needs {spec.checkpoint_shape}"
        )
    # Few parameters have a type of their own; the others are of this already.
    source = dataclasses.replace(source, dtype=np.dtype(spec.dtype))
    read: Callable[[Index | None], np.ndarray] = source.load
    if spec.kv_repeats > 1:
        read = _repeat_kv_heads(source, spec.rolled_shape)
    if spec.num_in_axes:
        read = _roll_axes(read, spec.num_in_axes)
    sharding = NamedSharding(mesh, spec.spec)
    return jax.make_array_from_callback(spec.shape, sharding, read, dtype=spec.dtype)


def _roll_axes(
    read: Callable[[Index | None], np.ndarray], num_in_axes: int
) -> Callable[[Index | None], np.ndarray]:
    """Read with the last ``num_in_axes`` axes of the checkpoint in front."""

    def read_rolled(index: Index | None) -> np.ndarray:
        part = read(index and index[num_in_axes:] + index[:num_in_axes])
        num_out_axes = part.ndim - num_in_axes
        axes = (*range(num_out_axes, part.ndim), *range(num_out_axes))
        return np.ascontiguousarray(part.transpose(axes))

    return read_rolled


def _repeat_kv_heads(
    source: Parameter, shape: tuple[int, ...]
) -> Callable[[Index | None], np.ndarray]:
    """Read a fused weight [K, G + 2, H, ...] as [K * r, G / r + 2, H, ...].

    With more shards than KV heads each head is held r times, with its share of the queries.
    """
    repeats, share = shape[0] // source.shape[0], shape[1] - 2

    def read_head(head: int, rest: Index) -> np.ndarray:
        whole = source.load((slice(head // repeats, head // repeats + 1), slice(None), *rest))
        first = head % repeats * share
        return np.concatenate([whole[:, first : first + share], whole[:, -2:]], axis=1)

    def read(index: Index | None) -> np.ndarray:
        index = index or (slice(None),) * len(shape)
        wanted = range(shape[0])[index[0]]
        stacked = np.concatenate([read_head(head, index[2:]) for head in wanted])
        return stacked[:, index[1]]

    return read


def random_params(specs: dict[str, ParamSpec], mesh: Mesh, seed: int) -> Params:
    """Make dummy weights on the devices: norms are 1, the rest normal with deviation 0.02."""
    key = jax.random.key(seed, impl="rbg")  # the fast generator: these are gigabytes
    makers: dict[Any, Callable] = {}
    params = {}
    for path, spec in specs.items():
        kind = (spec.shape, spec.dtype, spec.spec, spec.init)
        if kind not in makers:
            makers[kind] = jax.jit(_maker(spec), out_shardings=NamedSharding(mesh, spec.spec))
        # By name, so that a stage makes what the whole model would have there.
        params[path] = makers[kind](jax.random.fold_in(key, zlib.crc32(path.encode())))
    return params


def _maker(spec: ParamSpec) -> Callable[[jax.Array], jax.Array]:
    if spec.init in ("ones", "zeros"):
        return lambda key: jnp.full(spec.shape, int(spec.init == "ones"), spec.dtype)
    return lambda key: jax.random.normal(key, spec.shape, spec.dtype) * 0.02
