"""OutputParser: what a route feeds with text: reasoning first, then calls, then content.

The parsers by name, with vLLM's names. One more is a file and a row here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxengine.server.parsers.deepseek_v3 import DeepSeekV3Parser
from jaxengine.server.parsers.deltas import Delta, ParsedOutput, collect, joined
from jaxengine.server.parsers.forced_calls import NamedCallParser, RequiredCallsParser
from jaxengine.server.parsers.harmony import HarmonyParser
from jaxengine.server.parsers.hermes import HermesParser
from jaxengine.server.parsers.llama3_json import Llama3JsonParser
from jaxengine.server.parsers.mistral import MistralParser
from jaxengine.server.parsers.pythonic import PythonicParser
from jaxengine.server.parsers.qwen3_coder import Qwen3CoderParser
from jaxengine.server.parsers.reasoning import (
    DeepSeekR1Parser,
    LeadingThinkParser,
    ThinkParser,
    prompt_closes,
    prompt_leaves_open,
)
from jaxengine.server.parsers.stream_parser import StreamParser
from jaxengine.server.parsers.tool_choice import ToolChoice

Tools = Sequence[Mapping[str, Any]]
TOOL_PARSERS: dict[str, Callable[[Tools], StreamParser]] = {
    "hermes": lambda _: HermesParser(),
    "llama3_json": lambda _: Llama3JsonParser(),
    "llama4_json": lambda _: Llama3JsonParser(),
    "mistral": lambda _: MistralParser(),
    "pythonic": lambda _: PythonicParser(),
    "llama4_pythonic": lambda _: PythonicParser(),
    "qwen3_coder": Qwen3CoderParser,
    "qwen3_xml": Qwen3CoderParser,
    "deepseek_v3": lambda _: DeepSeekV3Parser(),
    "deepseek_v31": lambda _: DeepSeekV3Parser(),
    "openai": lambda _: HarmonyParser(),
}
HARMONY = ("openai", "gpt_oss", "openai_gptoss")  # one parser for reasoning and calls
REASONING_PARSERS: dict[str, type[ThinkParser]] = {
    "deepseek_r1": DeepSeekR1Parser,
    "qwen3": LeadingThinkParser,
    "think": ThinkParser,
}


class OutputParser:
    """Parses one output of a chat.

    Args:
        tool_parser: Name of the parser of the model's calls; empty for none.
        reasoning_parser: Name of the parser of its reasoning; empty for none.
        tools: The request's tools, in OpenAI's form.
        tool_choice: What the request says about them; none: calls are content.
        prompt: The end of the prompt at least: reasoning may have begun, or be over, in it.

    Raises:
        ValueError: If there is no parser of that name.
    """

    def __init__(
        self,
        *,
        tool_parser: str = "",
        reasoning_parser: str = "",
        tools: Tools = (),
        tool_choice: ToolChoice = ToolChoice("none"),  # noqa: B008 (immutable)
        prompt: str = "",
    ) -> None:
        check_parsers(tool_parser, reasoning_parser)
        self._stages: list[StreamParser] = []  # each parses the content of the one before
        if tool_parser in HARMONY or reasoning_parser in HARMONY:
            self._stages.append(HarmonyParser())
            tool_parser = ""
        elif reasoning_parser and not prompt_closes(prompt):
            parser = REASONING_PARSERS[reasoning_parser]
            self._stages.append(parser(is_open=prompt_leaves_open(prompt)))
        if tool_choice.mode == "required":
            self._stages.append(RequiredCallsParser())
        elif tool_choice.mode == "named":
            self._stages.append(NamedCallParser(tool_choice.name or ""))
        elif tool_choice.mode == "auto" and tool_parser:
            self._stages.append(TOOL_PARSERS[tool_parser](tools))

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the text must come with its special tokens (skip_special_tokens=False)."""
        return any(stage.needs_special_tokens for stage in self._stages)

    def feed(self, text: str) -> list[Delta]:
        """Take in the next piece of the output; return what it brings."""
        return joined(self._through(0, [Delta(content=text)] if text else []))

    def finish(self) -> list[Delta]:
        """Say that the output has ended; return what was held back."""
        deltas: list[Delta] = []
        for number, stage in enumerate(self._stages):
            deltas += self._through(number + 1, stage.finish())
        return joined(deltas)

    def parse(self, text: str) -> ParsedOutput:
        """Parse a whole output; of a new parser only."""
        return collect([*self.feed(text), *self.finish()])

    def _through(self, first: int, deltas: Iterable[Delta]) -> list[Delta]:
        """Send content through the stages from one on; all else is past them."""
        passed = list(deltas)
        for stage in self._stages[first:]:
            passed = [
                after
                for delta in passed
                for after in (stage.feed(delta.content) if delta.content else [delta])
            ]
        return passed


def check_parsers(tool_parser: str, reasoning_parser: str) -> None:
    """Raise ValueError if a name is not known; for flags, before a model is loaded."""
    for flag, name, known in (
        ("--tool-call-parser", tool_parser, tuple({**TOOL_PARSERS, **dict.fromkeys(HARMONY)})),
        ("--reasoning-parser", reasoning_parser, (*REASONING_PARSERS, *HARMONY)),
    ):
        if name and name not in known:
            raise ValueError(f"{flag} is {name!r}; known are {', '.join(known)}")
