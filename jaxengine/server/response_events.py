"""The events of a streamed response: items that open, grow and close."""

import itertools
from collections.abc import Mapping
from typing import Any

from jaxengine.server.parsers.deltas import Delta, ToolCallDelta
from jaxengine.server.responses_form import (
    call_item,
    message_item,
    new_item_id,
    reasoning_item,
    text_part,
)
from jaxengine.server.streaming import named_event


class ItemWriter:
    """Writes the items of an output, one after the other.

    Attributes:
        items: Those that are complete.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._numbers = itertools.count()
        self._kind: object = None  # of the item that is open; a call's is its number
        self._id = ""
        self._text = ""
        self._call = ToolCallDelta(0)

    def event(self, kind: str, values: Mapping[str, Any]) -> bytes:
        """Write an event with the next number."""
        number = next(self._numbers)
        return named_event(kind, {"type": kind, "sequence_number": number, **values})

    def write(self, deltas: list[Delta]) -> list[bytes]:
        """Write the events of some pieces."""
        events: list[bytes] = []
        for delta in deltas:
            if (call := delta.tool_call) is not None:
                if call.id is not None:
                    self._call = call
                events += self._open(("call", call.index))
                events += self._grow("response.function_call_arguments.delta", call.arguments)
            elif delta.content:
                events += self._open("message")
                events += self._grow("response.output_text.delta", delta.content)
            elif delta.reasoning:
                events += self._open("reasoning")
                events += self._grow("response.reasoning_text.delta", delta.reasoning)
        return events

    def close(self) -> list[bytes]:
        """End the item that is open."""
        if self._kind is None:
            return []
        item = self._item("completed")
        events = []
        if self._kind == "message":
            done = {**self._place, "text": self._text, "logprobs": []}
            events.append(self.event("response.output_text.done", done))
            part = {**self._place, "part": text_part(self._text)}
            events.append(self.event("response.content_part.done", part))
        elif self._kind == "reasoning":
            done = {**self._place, "text": self._text}
            events.append(self.event("response.reasoning_text.done", done))
        else:
            done = {**self._place, "arguments": self._text, "name": self._call.name}
            del done["content_index"]
            events.append(self.event("response.function_call_arguments.done", done))
        ended = {"output_index": len(self.items), "item": item}
        events.append(self.event("response.output_item.done", ended))
        self.items.append(item)
        self._kind = None
        return events

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": len(self.items), "content_index": 0}

    def _open(self, kind: object) -> list[bytes]:
        if kind == self._kind:
            return []
        events = self.close()
        prefix = {"message": "msg", "reasoning": "rs"}.get(str(kind), "fc")
        self._kind, self._id, self._text = kind, new_item_id(prefix), ""
        added = {"output_index": len(self.items), "item": self._item("in_progress")}
        events.append(self.event("response.output_item.added", added))
        if kind == "message":
            part = {**self._place, "part": text_part("")}
            events.append(self.event("response.content_part.added", part))
        return events

    def _grow(self, kind: str, text: str) -> list[bytes]:
        if not text:
            return []
        self._text += text
        values = {**self._place, "delta": text}
        if kind == "response.output_text.delta":
            values["logprobs"] = []
        return [self.event(kind, values)]

    def _item(self, status: str) -> dict[str, Any]:
        if self._kind == "message":
            return message_item(self._id, self._text, status)
        if self._kind == "reasoning":
            return reasoning_item(self._id, self._text, status)
        call = self._call
        return call_item(self._id, call.id or "", call.name or "", self._text, status)
