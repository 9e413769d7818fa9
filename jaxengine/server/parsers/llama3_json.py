"""Llama 3.x: the output is ``{"name": ..., "parameters": {...}}``, or several after each other."""

from jaxengine.server.parsers.json_calls import JsonCallParser
from jaxengine.server.parsers.stream_parser import Parsing

TAG = "<|python_tag|>"


class Llama3JsonParser(JsonCallParser):
    """Calls are parted by semicolons or white space; an output that begins otherwise is content."""

    def _parse(self) -> Parsing[None]:
        before = yield from self._space()
        if (yield from self._at(TAG)):
            before += self._take(len(TAG))
            before += yield from self._space()
        while (yield from self._peek()) == "{":
            not_a_call = yield from self._json_call()
            if not_a_call is not None:
                self._content(before + not_a_call)
                yield from self._rest(self._content)
                return
            before = yield from self._space()
            if (yield from self._peek()) == ";":
                before += self._take(1)
                before += yield from self._space()
        if (yield from self._peek()):
            self._content(before)
        yield from self._rest(self._content)
