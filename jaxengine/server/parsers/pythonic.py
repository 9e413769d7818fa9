"""Llama 3.2 and 4, ToolACE: the output is a Python list of calls, ``[f(a=1), g(b="x")]``."""

import ast
import json
import re
from typing import Any

from jaxengine.server.parsers.stream_parser import SPACE, Parsing, StreamParser

START, END = "<|python_start|>", "<|python_end|>"
MAX_NAME = 256  # characters of a function's name


class PythonicParser(StreamParser):
    """Each call is passed on when it is whole; an output that begins otherwise is content."""

    def _parse(self) -> Parsing[None]:
        before = yield from self._space()
        if (yield from self._at(START)):
            before += self._take(len(START))
            before += yield from self._space()
        if (yield from self._peek()) == "[":
            before += self._take(1)
            not_a_call = yield from self._calls()
            if not_a_call is None:
                yield from self._space()
                if (yield from self._at(END)):
                    self._take(len(END))
                yield from self._space()
                before = ""
            else:
                before += not_a_call
        self._content(before)
        yield from self._rest(self._content)

    def _calls(self) -> Parsing[str | None]:
        """Read calls up to the bracket; return the text that is none, if the first is not one."""
        is_first = True
        while True:
            taken = yield from self._space()
            if (yield from self._peek()) == "]" and not is_first:
                self._take(1)
                return None
            taken += yield from self._call_text()
            call = _parsed_call(taken)
            if call is None:
                if is_first:
                    return taken
                self._content(taken)
                return None
            name, arguments = call
            self._begin_call(name)(json.dumps(arguments, ensure_ascii=False))
            is_first = False
            yield from self._space()
            if (yield from self._peek()) == ",":
                self._take(1)

    def _call_text(self) -> Parsing[str]:
        """Take text up to the bracket that closes the first one, or to where it is no call."""
        text = ""
        while re.match(r"[\w.\-]", (yield from self._peek())) and len(text) < MAX_NAME:
            text += self._take(1)
        text += yield from self._space()
        if (yield from self._peek()) != "(" or not text.strip():
            return text
        depth, quote, is_escaped = 0, "", False
        while character := (yield from self._peek()):
            text += self._take(1)
            if quote:
                if character == quote and not is_escaped:
                    quote = ""
                is_escaped = character == "\\" and not is_escaped
            elif character in "'\"":
                quote = character
            else:
                depth += (character in "([{") - (character in ")]}")
                if depth == 0:
                    break
        return text


def _parsed_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call; None if it is none, or has more than literals by name."""
    try:
        (statement,) = ast.parse(text.strip(SPACE)).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    call = getattr(statement, "value", None)
    if not isinstance(call, ast.Call) or call.args:
        return None
    try:
        return ast.unparse(call.func), {str(k.arg): _value(k.value) for k in call.keywords if k.arg}
    except (ValueError, TypeError, RecursionError):
        return None


def _value(node: ast.expr) -> Any:
    """A literal, as JSON has it; ``true``, ``false`` and ``null`` are read, too."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        return {
            str(_value(key)): _value(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    value = ast.literal_eval(node)
    if value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"{value!r} is no JSON")
    return value
