"""Tool calls that are JSON objects, read while they are written."""

import json

from jaxengine.server.parsers.stream_parser import SPACE, Parsing, Sink, StreamParser

ARGUMENT_KEYS = ("arguments", "parameters")


class JsonCallParser(StreamParser):
    """Base of the parsers whose calls are ``{"name": ..., "arguments": {...}}``."""

    def _json_call(self) -> Parsing[str | None]:
        """Read an object as a tool call, which begins as soon as its name is known.

        Returns:
            None if it was one. Else the text that was taken, up to where it cannot be one any
            more: it is not JSON, has no name, or the output ends before the name does.
        """
        call = _Call(self)
        taken = [self._take(1)]  # the bracket
        while True:
            taken.append((yield from self._space()))
            separator = yield from self._peek()
            if separator == "}":
                taken.append(self._take(1))
                call.close()
                break
            if separator == ",":
                taken.append(self._take(1))
                taken.append((yield from self._space()))
            if not (yield from self._member(call, taken)):
                break
        return None if call.has_begun else "".join(taken)

    def _member(self, call: "_Call", taken: list[str]) -> Parsing[bool]:
        """Read a key and its value; returns whether they were whole and well formed."""
        if (yield from self._peek()) != '"':
            return False
        key_text: list[str] = []
        if not (yield from self._json_value(key_text.append)):
            taken += key_text
            return False
        taken += [*key_text, (yield from self._space())]
        if (yield from self._peek()) != ":":
            return False
        taken += [self._take(1), (yield from self._space())]
        key = _decoded("".join(key_text))
        value: list[str] = []
        is_text = (yield from self._peek()) == '"'
        is_streamed = key in ARGUMENT_KEYS and not is_text and call.has_begun

        def sink(text: str) -> None:
            value.append(text)
            taken.append(text)
            if is_streamed:
                call.add_arguments(text)

        is_whole = yield from self._json_value(sink)
        if is_whole and key == "name" and is_text:
            call.begin(str(_decoded("".join(value))))
        elif key in ARGUMENT_KEYS and not is_streamed and (is_whole or not is_text):
            text = "".join(value)
            call.add_arguments(str(_decoded(text)) if is_text else text)
        return is_whole

    def _json_value(self, sink: Sink) -> Parsing[bool]:
        """Hand a JSON value on as it comes; returns whether it was whole.

        Brackets are counted, not matched: what a model writes wrong is for the client to see.
        """
        first = yield from self._peek()
        if first not in ('"', "{", "["):
            return (yield from self._scalar(sink))
        depth, in_string, is_escaped = 0, False, False
        while (yield from self._peek()):
            for end, character in enumerate(self._buffer, 1):
                if in_string:
                    in_string = is_escaped or character != '"'
                    is_escaped = character == "\\" and not is_escaped
                else:
                    in_string = character == '"'
                    depth += (character in "{[") - (character in "}]")
                if depth == 0 and not in_string:
                    sink(self._take(end))
                    return True
            sink(self._take(len(self._buffer)))
        return False

    def _scalar(self, sink: Sink) -> Parsing[bool]:
        """A number or a word: up to what cannot belong to it."""
        has_any = False
        while (character := (yield from self._peek())) and character not in f",}}]{SPACE}":
            sink(self._take(1))
            has_any = True
        return has_any and bool(character)


class _Call:
    """A tool call while its object is read: keeps the arguments until the name is known."""

    def __init__(self, parser: JsonCallParser) -> None:
        self._parser = parser
        self._sink: Sink | None = None
        self._early_arguments = ""
        self._has_arguments = False

    @property
    def has_begun(self) -> bool:
        return self._sink is not None

    def begin(self, name: str) -> None:
        if self._sink is None:
            self._sink = self._parser._begin_call(name)
            self._sink(self._early_arguments)

    def add_arguments(self, text: str) -> None:
        self._has_arguments = True
        if self._sink is None:
            self._early_arguments += text
        else:
            self._sink(text)

    def close(self) -> None:
        if self._sink is not None and not self._has_arguments:
            self._sink("{}")


def _decoded(text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except json.JSONDecodeError:
        return text.strip('"')
