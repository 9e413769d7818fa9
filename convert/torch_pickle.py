"""Reads the pickle of a ``torch.save`` file without running what it says.

A pickle is a program for a stack machine: it may name any function and call it, and a few bytes of
it can ask for 2**62 bytes, or build a key whose hash takes years. This machine knows only the
instructions that torch writes; of names, only how tensors are rebuilt, the storage types and
OrderedDict; of keys, only text and numbers. A tensor is never built: what comes out are records
that say where its values lie. Every instruction takes a bounded time, so a whole pickle does.
Source of the instructions: Python's pickletools.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxengine.convert.errors import shown

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}


class Dtype(NamedTuple):
    """A dtype of torch, by name."""

    name: str


class Storage(NamedTuple):
    """A run of values in the zip file; how many of them there are is not checked yet."""

    dtype: Dtype
    key: str
    num_elements: Any


class TensorRecord(NamedTuple):
    """A tensor as the pickle describes it; its sizes are not checked yet."""

    storage: Storage
    dtype: Dtype
    offset: Any
    shape: Any
    strides: Any


class PickleError(ValueError):
    """The pickle is damaged, or says more than how tensors are rebuilt."""


class _Class(NamedTuple):
    """What a name in the pickle stands for: a function that makes a record."""

    name: str
    call: Callable[..., Any]


def _rebuild_v2(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRecord:
    dtype = storage.dtype if isinstance(storage, Storage) else None
    return _rebuild_v3(storage, offset, shape, strides, None, None, dtype)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorRecord:
    if not isinstance(storage, Storage) or not isinstance(dtype, Dtype):
        raise PickleError(f"its pickle rebuilds a tensor from a {type(storage).__name__}")
    return TensorRecord(storage, dtype, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Class("OrderedDict", OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2"): _Class("_rebuild_tensor_v2", _rebuild_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Class("_rebuild_tensor_v3", _rebuild_v3),
    ("torch._utils", "_rebuild_parameter"): _Class("_rebuild_parameter", _rebuild_parameter),
    ("torch.storage", "UntypedStorage"): Dtype("uint8"),
    **{("torch", name): Dtype(dtype) for name, dtype in STORAGES.items()},
    **{("torch", name): Dtype(name) for name in DTYPES},
}

_MARK = object()


def load(content: bytes) -> Any:
    """What the pickle describes: dicts, lists and tuples of records, texts and numbers.

    Raises:
        PickleError: If it is damaged, or holds an instruction, a name or a key that torch does
            not write for tensors.
    """
    machine = _Machine(content)
    try:
        return machine.run()
    except PickleError:
        raise
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise PickleError(
            f"its pickle is damaged at byte {machine.position} ({type(error).__name__}: "
            f"{str(error)[:80]})"
        ) from None


class _Machine:
    """The stack, the memo, and the place in the program."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            code = self.take(1)
            if code == b".":
                return self.stack.pop()
            instruction = INSTRUCTIONS.get(code)
            if instruction is None:
                raise PickleError(
                    f"its pickle has the instruction {code!r} at byte {self.position - 1}, which "
                    "torch does not write for tensors: the file is damaged, or made to do harm. "
                    "Use a safetensors checkpoint"
                )
            instruction(self)

    def take(self, count: int) -> bytes:
        if count > len(self.content) - self.position:
            raise PickleError(
                f"its pickle asks for {count} bytes at byte {self.position}, it has "
                f"{len(self.content)}: it is truncated or damaged"
            )
        start, self.position = self.position, self.position + count
        return self.content[start : self.position]

    def number(self, letter: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def line(self) -> str:
        end = self.content.find(b"\n", self.position, self.position + 1024)
        if end < 0:
            raise PickleError(f"its pickle has a name without end at byte {self.position}")
        return self.take(end + 1 - self.position)[:-1].decode()

    def marked(self) -> list[Any]:
        """The values above the last mark, which leaves the stack with them."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise PickleError(f"its pickle has no mark before byte {self.position}")

    def push(self, value: Any) -> None:
        self.stack.append(value)


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.push(value)


def _fixed(letter: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.number(letter))


def _text(letter: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(letter)).decode())


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def run(m: _Machine) -> None:
        if len(m.stack) < count or any(value is _MARK for value in m.stack[-count:]):
            raise PickleError(f"its pickle has no {count} values before byte {m.position}")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return run


def _long(m: _Machine) -> None:
    m.push(int.from_bytes(m.take(m.number("B")), "little", signed=True))


def _name(m: _Machine, module: str, name: str) -> None:
    if (module, name) not in KNOWN:
        raise PickleError(
            f"its pickle names {module[:80]}.{name[:80]}, which is no part of a tensor. A pickle "
            "can run any code, so this file is refused: use a safetensors checkpoint"
        )
    m.push(KNOWN[module, name])


def _global(m: _Machine) -> None:
    _name(m, m.line(), m.line())


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError(f"its pickle has a damaged name before byte {m.position}")
    _name(m, module, name)


def _reduce(m: _Machine) -> None:
    arguments, function = m.stack.pop(), m.stack.pop()
    # torch makes an OrderedDict empty and fills it; its constructor would take more than that.
    takes_none = isinstance(function, _Class) and function.call is OrderedDict
    if not isinstance(function, _Class) or not isinstance(arguments, tuple):
        raise PickleError(f"its pickle calls a {type(function).__name__} before byte {m.position}")
    if takes_none and arguments:
        raise PickleError("its pickle calls OrderedDict with arguments, which torch never does")
    m.push(function.call(*arguments))


def _build(m: _Machine) -> None:
    # Of a state dict torch saves its _metadata, which says nothing that is needed here.
    m.stack.pop()
    if not isinstance(m.stack[-1], OrderedDict):
        raise PickleError(
            f"its pickle sets attributes of a {type(m.stack[-1]).__name__}: there is no attribute "
            "to set, the file is damaged or made to do harm"
        )


def _persistent(m: _Machine) -> None:
    pid = m.stack.pop()
    if not isinstance(pid, tuple) or len(pid) != 5:
        raise PickleError(f"its pickle has a damaged storage before byte {m.position}")
    _, dtype, key, _, num_elements = pid
    if not isinstance(dtype, Dtype) or not isinstance(key, str):
        raise PickleError(f"its pickle has a storage of unknown type {type(dtype).__name__}")
    m.push(Storage(dtype, key, num_elements))


def _set(m: _Machine, pairs: list[Any]) -> None:
    target = m.stack[-1]
    if not isinstance(target, dict) or len(pairs) % 2:
        raise PickleError(f"its pickle fills a {type(target).__name__} before byte {m.position}")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        # Nested tuples that share their parts take exponential time to hash.
        if not isinstance(key, str | int | float | None):
            raise PickleError(f"its pickle has a key that is a {type(key).__name__}, not a text")
        if key in target:
            raise PickleError(f"its pickle has the key {shown(key)} twice")
        target[key] = value


def _set_one(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _set(m, [key, value])


def _append(m: _Machine, values: list[Any]) -> None:
    if not isinstance(m.stack[-1], list):
        raise PickleError(f"its pickle appends to no list before byte {m.position}")
    m.stack[-1].extend(values)


def _append_one(m: _Machine) -> None:
    value = m.stack.pop()
    _append(m, [value])


def _memoize(m: _Machine, place: int) -> None:
    m.memo[place] = m.stack[-1]


INSTRUCTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # protocol
    b"\x95": lambda m: m.take(8),  # frame
    b"(": _constant(_MARK),
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b")": _constant(()),
    b"J": _fixed("i"),
    b"K": _fixed("B"),
    b"M": _fixed("H"),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"\x8a": _long,
    b"X": _text("I"),
    b"\x8c": _text("B"),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"t": lambda m: m.push(tuple(m.marked())),
    b"s": _set_one,
    b"u": lambda m: _set(m, m.marked()),
    b"a": _append_one,
    b"e": lambda m: _append(m, m.marked()),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"b": _build,
    b"Q": _persistent,
    b"q": lambda m: _memoize(m, m.number("B")),
    b"r": lambda m: _memoize(m, m.number("I")),
    b"\x94": lambda m: _memoize(m, len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number("B")]),
    b"j": lambda m: m.push(m.memo[m.number("I")]),
}
