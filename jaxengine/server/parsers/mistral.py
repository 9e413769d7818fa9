"""Mistral: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`` or ``[TOOL_CALLS]name{...}``.

The newer form may have ``[CALL_ID]`` and an id, and ``[ARGS]``, between name and arguments.
"""

import secrets
import string

from jaxengine.server.parsers.deltas import NewId
from jaxengine.server.parsers.json_calls import JsonCallParser
from jaxengine.server.parsers.stream_parser import Parsing, SpaceTrimmer

BEGIN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def new_mistral_id() -> str:
    """Mistral's chat templates take ids of exactly nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class MistralParser(JsonCallParser):
    """Text around the calls is content; white space next to a call belongs to neither."""

    needs_special_tokens = True

    def __init__(self, new_id: NewId = new_mistral_id) -> None:
        super().__init__(new_id)

    def _parse(self) -> Parsing[None]:
        is_behind_call = False
        while True:
            content = SpaceTrimmer(self._content, is_at_start=is_behind_call)
            if (yield from self._until([BEGIN], content)) is None:
                if not is_behind_call:
                    content.release()
                return
            space = yield from self._space()
            first = yield from self._peek()
            not_a_call = yield from (self._array() if first in ("[", "{") else self._named())
            if not_a_call is not None:
                content.release()
                self._content(BEGIN + space + not_a_call)
            is_behind_call = not_a_call is None

    def _array(self) -> Parsing[str | None]:
        """Read one object or an array of them; return the text if the first is no call."""
        taken, is_first = "", True
        if (yield from self._peek()) == "[":
            taken += self._take(1)
        while True:
            taken += yield from self._space()
            if (yield from self._peek()) == "," and not is_first:
                self._take(1)
                yield from self._space()
            if (yield from self._peek()) != "{":
                break
            not_a_call = yield from self._json_call()
            if not_a_call is not None:
                if is_first:
                    return taken + not_a_call
                self._content(not_a_call)
                return None
            is_first = False
        if is_first:
            return taken
        if (yield from self._peek()) == "]":
            self._take(1)
        return None

    def _named(self) -> Parsing[str | None]:
        """Read a name and its arguments; return the text if there are none."""
        name: list[str] = []
        ends = [CALL_ID, ARGS, "{"]
        end = yield from self._until(ends, name.append)
        if end == CALL_ID:
            end = yield from self._until([ARGS, "{"], lambda _: None)
        if end is None:
            return "".join(name)
        if end == "{":
            self._buffer = "{" + self._buffer
        add_arguments = self._begin_call("".join(name).strip())
        yield from self._space()
        if (yield from self._peek()) == "{":
            yield from self._json_value(add_arguments)
        return None
