"""Structural tags -> a grammar: free text in which some parts, once begun, must obey a schema.

Two notations, both vLLM's. The older one has ``structures`` (begin, schema, end) and ``triggers``:
text that, once generated, must go on as one of the structures. In the newer one ``format`` is a
tree whose nodes have a ``type``: one function below for each.

Special tokens are no text to a grammar, so every literal is cut where it spells one.
Source: docs/syntax.md of llguidance, "Tool calling".
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llguidance

TEXT = r"/(.|\n)*/"
Node = Mapping[str, Any]


def structural_tag_grammar(tag: Node, special_ids: Mapping[str, int]) -> str:
    """Return the grammar of a structural tag.

    Args:
        tag: In either notation.
        special_ids: Text of a special token -> its id.

    Raises:
        ValueError: If the tag is malformed.
    """
    writer = _GrammarWriter(special_ids)
    if "format" in tag:
        body = writer.expression(_field(tag, "format"))
    elif "structures" in tag:
        body = writer.triggered_tags(_modern(tag))
    else:
        raise ValueError("structural_tag needs either 'format' or 'structures' and 'triggers'")
    return writer.grammar(body)


def _modern(tag: Node) -> dict[str, Any]:
    """The older notation in the newer one's words."""
    tags = [
        {
            "begin": _field(structure, "begin"),
            "content": {"type": "json_schema", "json_schema": structure.get("schema", {})},
            "end": structure.get("end", ""),
        }
        for structure in tag["structures"]
    ]
    return {"triggers": _field(tag, "triggers"), "tags": tags}


class _GrammarWriter:
    """Collects the rules of a Lark grammar; every method returns an expression."""

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self._special_ids = special_ids
        self._rules: list[str] = []
        self._inner_grammars: list[dict[str, str]] = []
        self._num_names = 0
        self._kinds: dict[str, Callable[[Node], str]] = {
            "const_string": lambda node: self.literal(_field(node, "value")),
            "json_schema": lambda node: f"%json {json.dumps(_field(node, 'json_schema'))}",
            "regex": lambda node: f"/{llguidance.regex_to_lark(_field(node, 'pattern'))}/",
            "grammar": self._inner_grammar,
            "any_text": lambda _: self._rule(TEXT),
            "sequence": self._sequence,
            "or": lambda node: self._any_of(_list(node, "elements")),
            "tag": self._tag,
            "triggered_tags": self.triggered_tags,
            "tags_with_separator": self._tags_with_separator,
        }

    def grammar(self, body: str) -> str:
        """Return the whole grammar, whose start is an expression."""
        lark = "\n".join(["%llguidance {}", f"start: {body}", *self._rules])
        grammars = [{"name": "structural_tag", "lark_grammar": lark}, *self._inner_grammars]
        return json.dumps({"grammars": grammars})

    def expression(self, node: Any) -> str:
        """Write a node of a format."""
        kind = node.get("type") if isinstance(node, Mapping) else None
        write = self._kinds.get(str(kind))
        if write is None:
            raise ValueError(
                f"structural_tag has a format of type {kind!r}; known are {', '.join(self._kinds)}"
            )
        return write(node)

    def literal(self, text: Any) -> str:
        """Write a text that may spell special tokens."""
        if not isinstance(text, str):
            raise ValueError(f"structural_tag needs a text where it has {text!r}")
        return " ".join(
            f"<[{self._special_ids[piece]}]>" if piece in self._special_ids else json.dumps(piece)
            for piece in self._cut(text)
        )

    def triggered_tags(self, node: Node) -> str:
        """Any text; where it comes to a trigger, one of the tags that begin so must follow."""
        triggers, tags = _list(node, "triggers"), _list(node, "tags")
        written = self._alternatives([self._triggered(tag, triggers) for tag in tags])
        at_least_one = node.get("at_least_one", False)
        if node.get("stop_after_first", False):
            return written if at_least_one else f"({written} | {self._rule(TEXT)})"
        return f"({written}){'+' if at_least_one else '*'} {self._rule(TEXT)}"

    def _triggered(self, tag: Node, triggers: Sequence[str]) -> str:
        begin = _field(tag, "begin")
        trigger = next((t for t in triggers if t and begin.startswith(t)), None)
        if trigger is None:
            raise ValueError(f"structural_tag: no trigger of {triggers} begins the tag {begin!r}")
        rest = self._ended(tag)
        first, *others = self._cut(trigger)
        if others or first in self._special_ids:
            head = f"{self._rule(TEXT)} {self.literal(trigger)}"
        else:
            head = self._rule(f"{TEXT} {json.dumps(trigger)}", is_lazy=True)
        if after := begin[len(trigger) :]:
            head += f" {self.literal(after)}"
        return self._rule(f"{head} {rest}")

    def _tag(self, node: Node) -> str:
        begin = self.literal(_field(node, "begin")) if _field(node, "begin") else ""
        return self._rule(f"{begin} {self._ended(node)}")

    def _ended(self, tag: Node) -> str:
        """A tag's content and its end, behind its begin."""
        content, end = _field(tag, "content"), tag.get("end", "")
        if isinstance(end, list):  # any of several ends
            return "(" + " | ".join(self._ended({**tag, "end": each}) for each in end) + ")"
        is_text = isinstance(content, Mapping) and content.get("type") == "any_text"
        pieces = self._cut(end)
        if is_text and pieces and pieces[0] not in self._special_ids:  # ends where it first can
            text = self._rule(f"{TEXT} {json.dumps(pieces[0])}", is_lazy=True)
            rest = end[len(pieces[0]) :]
            return f"{text} {self.literal(rest)}" if rest else text
        written = self.expression(content)
        return f"{written} {self.literal(end)}" if end else written

    def _tags_with_separator(self, node: Node) -> str:
        tags = self._alternatives([self._tag(tag) for tag in _list(node, "tags")])
        separator = self.literal(node["separator"]) if node.get("separator") else ""
        written = f"{tags} ({separator} {tags})*"
        if node.get("stop_after_first", False):
            written = tags
        return written if node.get("at_least_one", False) else f"({written})?"

    def _sequence(self, node: Node) -> str:
        return " ".join(f"({self.expression(each)})" for each in _list(node, "elements"))

    def _any_of(self, nodes: Sequence[Node]) -> str:
        return self._alternatives([self.expression(each) for each in nodes])

    def _inner_grammar(self, node: Node) -> str:
        name = self._new_name()
        lark = as_lark(_field(node, "grammar"))
        self._inner_grammars.append({"name": name, "lark_grammar": lark})
        return f"@{name}"

    def _alternatives(self, written: Sequence[str]) -> str:
        return f"({' | '.join(written)})"

    def _rule(self, body: str, *, is_lazy: bool = False) -> str:
        """Name an expression."""
        name = self._new_name()
        self._rules.append(f"{name}{'[lazy]' if is_lazy else ''}: {body}")
        return name

    def _new_name(self) -> str:
        self._num_names += 1
        return f"part_{self._num_names}"

    def _cut(self, text: str) -> list[str]:
        """Cut a text around the special tokens that it spells."""
        if not self._special_ids:
            return [text] if text else []
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        pattern = "|".join(re.escape(token) for token in longest_first)
        return [piece for piece in re.split(f"({pattern})", text) if piece]


def as_lark(grammar: str) -> str:
    """Return a grammar in Lark's notation, translated if it is in GBNF's."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(grammar))
    except Exception as error:  # a parser of its own, with plain exceptions
        raise ValueError(f"grammar is neither Lark nor GBNF: {error}") from None


def _field(node: Any, name: str) -> Any:
    if not isinstance(node, Mapping) or name not in node:
        raise ValueError(f"structural_tag: {name!r} is missing in {node!r:.100}")
    return node[name]


def _list(node: Node, name: str) -> list[Any]:
    value = _field(node, name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"structural_tag: {name!r} must be a list, not empty, got {value!r:.100}")
    return value
