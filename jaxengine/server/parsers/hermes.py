"""Hermes, Qwen 2.5 and 3: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` in text."""

from jaxengine.server.parsers.json_calls import JsonCallParser
from jaxengine.server.parsers.stream_parser import Parsing, SpaceTrimmer

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(JsonCallParser):
    """Text around the calls is content; white space next to a call belongs to neither."""

    def _parse(self) -> Parsing[None]:
        is_behind_call = False
        while True:
            content = SpaceTrimmer(self._content, is_at_start=is_behind_call)
            if (yield from self._until([BEGIN], content)) is None:
                if not is_behind_call:
                    content.release()
                return
            space = yield from self._space()
            if (yield from self._peek()) == "{":
                not_a_call = yield from self._json_call()
            else:
                not_a_call = ""
            if not_a_call is None:
                yield from self._until([END], lambda _: None)
                is_behind_call = True
            else:
                content.release()
                self._content(BEGIN + space + not_a_call)
                is_behind_call = False
