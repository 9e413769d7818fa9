"""Outputs that ``tool_choice`` forces into a form: no markers, only JSON.

``named``: the output is the function's arguments. ``required``: it is an array of
``{"name": ..., "parameters": {...}}``. ``tool_choice`` writes the schemas for both.
"""

from jaxengine.server.parsers.deltas import NewId, new_call_id
from jaxengine.server.parsers.json_calls import JsonCallParser
from jaxengine.server.parsers.stream_parser import Parsing, StreamParser


class NamedCallParser(StreamParser):
    """The whole output is the arguments of one call.

    Args:
        name: The function's.
        new_id: Names the call.
    """

    def __init__(self, name: str, new_id: NewId = new_call_id) -> None:
        self._name = name
        super().__init__(new_id)

    def _parse(self) -> Parsing[None]:
        if (yield from self._peek()):
            yield from self._rest(self._begin_call(self._name))


class RequiredCallsParser(JsonCallParser):
    """The output is an array of calls; what is not becomes content."""

    def _parse(self) -> Parsing[None]:
        before = yield from self._space()
        if (yield from self._peek()) == "[":
            before += self._take(1)
        while True:
            before += yield from self._space()
            if (yield from self._peek()) != "{":
                break
            not_a_call = yield from self._json_call()
            if not_a_call is not None:
                self._content(before + not_a_call)
                before = ""
                break
            before = yield from self._space()
            if (yield from self._peek()) == ",":
                self._take(1)
            elif (yield from self._peek()) == "]":
                self._take(1)
                before = yield from self._space()
                break
        if (yield from self._peek()):
            self._content(before)
        yield from self._rest(self._content)
