"""Qwen3-Coder: calls as tags, ``<function=f><parameter=a>value</parameter></function>``.

A call stands in ``<tool_call>`` tags, which the model sometimes leaves out. Values are plain text;
the tool's schema says what they are.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.server.parsers.deltas import NewId, new_call_id
from jaxengine.server.parsers.stream_parser import Parsing, SpaceTrimmer, StreamParser

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class Qwen3CoderParser(StreamParser):
    """Each parameter is passed on when it is whole.

    Args:
        tools: The request's tools, in OpenAI's form.
        new_id: Names tool calls.
    """

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] = (), new_id: NewId = new_call_id
    ) -> None:
        self._properties = {
            tool["function"]["name"]: (tool["function"].get("parameters") or {}).get(
                "properties", {}
            )
            for tool in tools
            if "function" in tool
        }
        super().__init__(new_id)

    def _parse(self) -> Parsing[None]:
        is_behind_call = False
        while True:
            content = SpaceTrimmer(self._content, is_at_start=is_behind_call)
            marker = yield from self._until([BEGIN, FUNCTION], content)
            if marker is None:
                if not is_behind_call:
                    content.release()
                return
            text = marker
            if marker == BEGIN:
                text += yield from self._space()
                if (yield from self._at(FUNCTION)):
                    text += self._take(len(FUNCTION))
                    marker = FUNCTION
            name: list[str] = []
            if marker == BEGIN or (yield from self._until([">"], name.append)) is None:
                content.release()
                self._content(text + "".join(name))
                is_behind_call = False
                continue
            yield from self._parameters("".join(name).strip())
            yield from self._space()
            if (yield from self._at(END)):
                self._take(len(END))
            is_behind_call = True

    def _parameters(self, function: str) -> Parsing[None]:
        add_arguments = self._begin_call(function)
        properties = self._properties.get(function, {})
        num_parameters = 0
        # A model may leave out a closing tag: whichever tag comes next ends a value.
        marker = yield from self._until([PARAMETER, FUNCTION_END, END], lambda _: None)
        while marker == PARAMETER:
            name: list[str] = []
            value: list[str] = []
            yield from self._until([">"], name.append)
            marker = yield from self._until(
                [PARAMETER_END, PARAMETER, FUNCTION_END, END], value.append
            )
            key = "".join(name).strip()
            written = json.dumps(_typed("".join(value), properties.get(key)), ensure_ascii=False)
            separator = ", " if num_parameters else "{"
            add_arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: {written}")
            num_parameters += 1
            if marker == PARAMETER_END:
                marker = yield from self._until([PARAMETER, FUNCTION_END, END], lambda _: None)
        if marker == END:
            self._buffer = END + self._buffer
        add_arguments("}" if num_parameters else "{}")


def _typed(text: str, schema: Any) -> Any:
    """The value that a text stands for; the text itself where the schema has it so."""
    text = text.removeprefix("\n").removesuffix("\n")
    types = schema.get("type") if isinstance(schema, Mapping) else None
    if types is None and not (isinstance(schema, Mapping) and {"anyOf", "oneOf"} & schema.keys()):
        return text
    types = [types] if isinstance(types, str) else types or []
    if text.strip().lower() == "null" and "string" not in types:
        return None
    if types == ["boolean"] and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    if "string" in types:
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
            json.dumps(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return value
    return text
