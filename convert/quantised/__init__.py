"""Quantised checkpoints of every published format, seen as plain ones.

A config's ``quantization_config`` names the format. ``plain_tensors`` puts a weight [out, in] in
the place of the planes that hold it, dequantised when it is read, so that no table needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxengine.convert.errors import shown
from jaxengine.convert.quantised import (
    awq,
    bitsandbytes,
    gptq,
    packed,
    scaled,
    squeezellm,
)
from jaxengine.convert.quantised.tensor import Planes
from jaxengine.convert.tensors import DTYPES, StoredTensor

Config = Mapping[str, Any]
Maker = Callable[[str, Planes], StoredTensor]

METHODS = (
    *("awq", "gptq", "squeezellm", "compressed-tensors", "fp8", "fbgemm_fp8", "modelopt"),
    *("bitsandbytes", "eetq"),
)
# Scales of activations and of the KV cache, which a computation in 16 bits does not need.
_UNUSED = (
    *("input_scale", "input_scale_ub", "activation_scale", "k_scale", "v_scale", "q_scale"),
    *("kv_scale", "prob_output_scale", "output_scale", "input_global_scale", "k_zero_point"),
    *("v_zero_point", "weight_format"),
)


def quantisation_of(config: Config) -> Config | None:
    """The quantisation that a config.json declares; None for none.

    Raises:
        ValueError: If it is of a format that is not read.
    """
    declared = config.get("quantization_config") or config.get("compression_config")
    if not declared:
        return None
    if not isinstance(declared, Mapping):
        raise ValueError(
            f"config.json has quantization_config={shown(declared)}: an object is needed"
        )
    method = method_of(declared)
    if method not in METHODS and method != "mxfp4":
        raise ValueError(
            f"config.json: the checkpoint is quantised with quant_method {shown(method)}, which is "
            f"not supported: use a checkpoint of one of {', '.join(METHODS)}, of GGUF, or a 16-bit "
            "one"
        )
    return declared


def method_of(declared: Config) -> str:
    """Name of the format, one spelling for each."""
    method = str(declared.get("quant_method") or declared.get("quant_algo") or "").lower()
    if not method and "load_in_4bit" in declared:
        method = "bitsandbytes"
    if method in ("fp8", "") and declared.get("quant_algo"):
        method = "modelopt"
    return {"modelopt_fp8": "modelopt", "compressed_tensors": "compressed-tensors"}.get(
        method, method
    )


def plain_tensors(
    tensors: Mapping[str, StoredTensor], config: Config
) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint, quantised weights as plain ones.

    Args:
        tensors: By name.
        config: Content of config.json.

    Raises:
        ValueError: If the format is not read, or the planes of a weight do not fit each other.
    """
    declared = quantisation_of(config)
    if declared is None or method_of(declared) == "mxfp4":
        return tensors
    suffixes, marker, make = _format(declared, _dtype(config))
    groups: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        base, suffix = _split(name, suffixes)
        if suffix:
            groups.setdefault(base, {})[suffix] = tensor
    plain: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        base, suffix = _split(name, suffixes)
        planes = groups.get(base, {})
        if suffix and any(m in planes for m in marker):
            plain.setdefault(f"{base}.weight", _made(make, f"{base}.weight", planes))
        elif not name.endswith(tuple(f".{unused}" for unused in _UNUSED)):
            plain[name] = tensor
    return plain


def _made(make: Maker, name: str, planes: Planes) -> StoredTensor:
    try:
        return make(name, planes)
    except (KeyError, IndexError, StopIteration) as error:
        raise ValueError(
            f"{name}: the quantised weight has {', '.join(sorted(planes))}, but lacks {error}"
        ) from None


def _split(name: str, suffixes: tuple[str, ...]) -> tuple[str, str]:
    """The module of a plane and its suffix; ("", "") for any other tensor."""
    for suffix in suffixes:
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), suffix
    return "", ""


def _dtype(config: Config) -> np.dtype:
    stored = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return DTYPES.get(stored, DTYPES["bfloat16"])


def _format(declared: Config, dtype: np.dtype) -> tuple[tuple[str, ...], tuple[str, ...], Maker]:
    """Suffixes of a format's planes, those that mark a quantised weight, and what reads them."""
    method = method_of(declared)
    if method == "awq":
        _check_awq(declared)
        return awq.SUFFIXES, ("qweight",), awq.tensor
    if method == "gptq":
        bits = _bits(declared, gptq.BITS)
        is_v2 = declared.get("checkpoint_format") == "gptq_v2"
        return gptq.SUFFIXES, ("qweight",), lambda n, p: gptq.tensor(n, p, bits=bits, is_v2=is_v2)
    if method == "squeezellm":
        bits = _bits(declared, (3, 4))
        return squeezellm.SUFFIXES, ("qweight",), lambda n, p: squeezellm.tensor(n, p, bits=bits)
    if method == "compressed-tensors":
        suffixes = (*packed.SUFFIXES, *scaled.SUFFIXES)
        groups = declared.get("config_groups") or {}
        return suffixes, ("weight_packed", *scaled.SCALES), _CompressedTensors(groups, dtype)
    if method == "bitsandbytes" and _is_4_bits(declared):
        marker = tuple(f"weight.{state}" for state in bitsandbytes.STATES)
        # The longest suffixes first: ".weight" is the end of none of the others.
        return bitsandbytes.SUFFIXES, marker, lambda n, p: bitsandbytes.tensor(n, p, dtype)
    block = declared.get("weight_block_size")
    size = (int(block[0]), int(block[1])) if block else None
    return (
        scaled.SUFFIXES,
        (*scaled.SCALES, "SCB"),
        lambda n, p: scaled.tensor(n, p, dtype, block=size),
    )


class _CompressedTensors:
    """Chooses the reader of a weight by the planes that it has."""

    def __init__(self, groups: Config, dtype: np.dtype) -> None:
        self._dtype = dtype
        weights = [group.get("weights") or {} for group in groups.values()]
        self._bits = {int(w["num_bits"]) for w in weights if w.get("num_bits")}

    def __call__(self, name: str, planes: Planes) -> StoredTensor:
        if "weight_packed" not in planes:
            return scaled.tensor(name, planes, self._dtype)
        if planes["weight_packed"].dtype == np.uint8:
            return packed.fp4(name, planes, self._dtype)
        num_in = int(planes["weight_shape"].rows(0, 2)[1])
        words = planes["weight_packed"].shape[1]
        # A checkpoint may mix widths: the words of a row tell which it is.
        bits = next((b for b in (2, 3, 4, 8) if -(-num_in * b // 32) == words), 0)
        if not bits:
            raise ValueError(f"{name}: {words} words a row do not hold {num_in} packed integers")
        return packed.integers(name, planes, bits=bits)


def _check_awq(declared: Config) -> None:
    version = str(declared.get("version") or "gemm").lower()
    if version != "gemm" or _bits(declared, (4,)) != 4:
        raise ValueError(
            f"the AWQ checkpoint is of version {version!r}: only 'gemm' is read; convert it with "
            "AutoAWQ, or take a 16-bit checkpoint"
        )


def _bits(declared: Config, allowed: tuple[int, ...]) -> int:
    bits = declared.get("bits", declared.get("w_bit", declared.get("wbits", 4)))
    if bits not in allowed:
        raise ValueError(
            f"quantization_config has bits={bits!r}: {method_of(declared)} is read with "
            f"{', '.join(map(str, allowed))} bits"
        )
    return int(bits)


def _is_4_bits(declared: Config) -> bool:
    return bool(declared.get("load_in_4bit", declared.get("_load_in_4bit")))
