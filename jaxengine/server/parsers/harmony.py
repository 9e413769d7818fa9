"""gpt-oss's harmony: messages on channels, for reasoning, tool calls and content alike.

``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary
to=functions.f <|constrain|>json<|message|>{...}<|call|>``; the answer is on the channel ``final``.
The output begins inside a header, as the prompt ends with ``<|start|>assistant``.
Source: the openai-harmony format description, "Channels" and "Receiving tool calls".
"""

import re

from jaxengine.server.parsers.stream_parser import Parsing, StreamParser

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")


class HarmonyParser(StreamParser):
    """analysis is reasoning; commentary to a function is a call, to nobody content."""

    needs_special_tokens = True

    def _parse(self) -> Parsing[None]:
        while True:
            header: list[str] = []
            marker = yield from self._until([MESSAGE, *ENDS], header.append)
            if marker is None:
                text = "".join(header)
                if CHANNEL not in text and START not in text:  # not harmony: no header at all
                    self._content(text)
                return
            if marker == MESSAGE:
                yield from self._message("".join(header))

    def _message(self, header: str) -> Parsing[None]:
        recipient = re.search(r"to=(?:functions\.)?([\w.\-]+)", header)
        if recipient is None:
            channel = re.search(r"<\|channel\|>\s*(\w+)", header)
            is_reasoning = channel is not None and channel[1] == "analysis"
            sink = self._reasoning if is_reasoning else self._content
            yield from self._until([*ENDS, START], sink)
            return
        add_arguments, pieces = self._begin_call(recipient[1]), 0

        def add(text: str) -> None:
            nonlocal pieces
            pieces += len(text)
            add_arguments(text)

        yield from self._until([*ENDS, START], add)
        if not pieces:
            add_arguments("{}")
