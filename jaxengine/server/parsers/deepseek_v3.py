"""DeepSeek V3, R1 and V3.1: calls between special tokens.

V3: ``<begin>function<sep>name``, a line end, the arguments in a fence of JSON, ``<end>``.
V3.1: ``<begin>name<sep>{arguments}<end>``.
"""

from jaxengine.server.parsers.json_calls import JsonCallParser
from jaxengine.server.parsers.stream_parser import Parsing, SpaceTrimmer

# The bars and the space-like blocks are those of the tokenizer.
CALLS_BEGIN = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
CALLS_END = "<\uff5ctool\u2581calls\u2581end\uff5c>"
CALL_BEGIN = "<\uff5ctool\u2581call\u2581begin\uff5c>"
CALL_END = "<\uff5ctool\u2581call\u2581end\uff5c>"
SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"


class DeepSeekV3Parser(JsonCallParser):
    """Text before the calls is content."""

    needs_special_tokens = True

    def _parse(self) -> Parsing[None]:
        is_behind_call = False
        while True:
            content = SpaceTrimmer(self._content, is_at_start=is_behind_call)
            marker = yield from self._until([CALLS_BEGIN, CALL_BEGIN, CALLS_END], content)
            if marker is None:
                if not is_behind_call:
                    content.release()
                return
            is_behind_call = True
            if marker == CALL_BEGIN:
                yield from self._call()

    def _call(self) -> Parsing[None]:
        kind: list[str] = []
        if (yield from self._until([SEPARATOR, CALL_END], kind.append)) != SEPARATOR:
            self._content(CALL_BEGIN + "".join(kind))
            return
        yield from self._space()
        name = "".join(kind).strip()
        end: str | None = "{"
        if (yield from self._peek()) != "{":
            written: list[str] = []
            end = yield from self._until(["\n", "{", CALL_END], written.append)
            name = "".join(written).strip()
            if end is None:
                self._content(CALL_BEGIN + "".join(kind) + SEPARATOR + "".join(written))
                return
            if end == "\n":
                end = yield from self._until(["{", CALL_END], lambda _: None)
            if end == "{":
                self._buffer = "{" + self._buffer
        add_arguments = self._begin_call(name)
        if end != "{":
            add_arguments("{}")
        else:
            yield from self._json_value(add_arguments)
        if end != CALL_END:
            yield from self._until([CALL_END], lambda _: None)
