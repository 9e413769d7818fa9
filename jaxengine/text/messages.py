"""Messages of a conversation, in the forms that clients send -> the form that templates expect.

OpenAI's clients send a content as text, as a list of parts or not at all, and the arguments of a
tool call as JSON text. Chat templates want one form of each; which one of a content can be read
from the template.
"""

import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2 import nodes

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
ContentFormat = Literal["string", "openai"]
CONTENT_FORMATS = ("auto", "string", "openai")
# Type of a part -> the key of its text.
TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


def split_conversations(messages: Any) -> list[list[Message]]:
    """Return a list of conversations, whether one was given or several.

    Raises:
        ValueError: If it is neither, or a conversation has no messages.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages must be a list of {{'role': ..., 'content': ...}}, got {messages!r:.200}"
        )
    is_one = bool(messages) and isinstance(messages[0], Mapping)
    conversations = [messages] if is_one else list(messages)
    for number, conversation in enumerate(conversations):
        if isinstance(conversation, str | Mapping) or not isinstance(conversation, Sequence):
            raise ValueError(
                f"conversation {number} must be a list of messages, got {conversation!r:.200}"
            )
        if not conversation:
            raise ValueError(f"conversation {number} has no messages: give at least one")
    return [list(conversation) for conversation in conversations]


def normalize_messages(
    messages: Sequence[Message], chat_template: str, content_format: str = "auto"
) -> list[dict[str, Any]]:
    """Bring every message into the form that a template expects; the given ones stay as they are.

    Args:
        messages: Of one conversation.
        chat_template: The template's source.
        content_format: "string" (contents are text), "openai" (lists of parts), or "auto".

    Raises:
        ValueError: If a message has no role, or a part that is not text.
    """
    if content_format not in CONTENT_FORMATS:
        known = ", ".join(CONTENT_FORMATS)
        raise ValueError(f"chat_template_content_format is {content_format!r}: use one of {known}")
    form = content_format if content_format != "auto" else find_content_format(chat_template)
    knows_developers = "'developer'" in chat_template or '"developer"' in chat_template
    return [
        _normalize(number, message, form, knows_developers)
        for number, message in enumerate(messages)
    ]


def _normalize(
    number: int, message: Message, content_format: str, knows_developers: bool
) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"message {number} must be a dict with a 'role' (user, assistant, ...) and a "
            f"'content', got {message!r:.200}"
        )
    normal = dict(message)
    if normal["role"] == "developer" and not knows_developers:
        normal["role"] = "system"
    texts = _texts(number, message.get("content"))
    if content_format == "string" or normal["role"] == "tool":
        normal["content"] = "\n".join(text for text in texts if text)
    else:
        normal["content"] = [{"type": "text", "text": text} for text in texts]
    if normal.get("tool_calls") is not None:
        normal["tool_calls"] = [
            _with_parsed_arguments(number, call) for call in normal["tool_calls"]
        ]
    if not normal.get("tool_calls"):
        normal.pop("tool_calls", None)  # templates ask whether there is such a key
    if normal.get("reasoning") is not None:
        normal.setdefault("reasoning_content", normal["reasoning"])
    return normal


def _texts(number: int, content: Any) -> list[str]:
    """Return the texts of a content's parts."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence):
        raise ValueError(
            f"message {number}: content must be text or a list of parts, got {content!r:.200}"
        )
    return [text for part in content if (text := _text_of(number, part)) is not None]


def _text_of(number: int, part: Any) -> str | None:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind not in TEXT_KEYS:
        raise ValueError(
            f"message {number}: a content part must be {{'type': 'text', 'text': ...}}, as this "
            f"model reads text only, got {part!r:.200}"
        )
    text = part.get(TEXT_KEYS[kind])
    if text is not None and not isinstance(text, str):
        raise ValueError(f"message {number}: the text of a content part is {text!r:.200}")
    return text


def _with_parsed_arguments(number: int, call: Any) -> dict[str, Any]:
    """Return a tool call whose arguments are a dict; {} where there is no JSON object.

    Text that is no JSON object is what a model has written in an earlier turn: an error would make
    all later turns impossible.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise ValueError(
            f"message {number}: a tool call must be {{'type': 'function', 'function': {{'name': "
            f"..., 'arguments': ...}}}}, got {call!r:.200}"
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        logger.warning("message %d: the arguments of a tool call are no JSON object", number)
        arguments = {}
    return {**call, "function": {**function, "arguments": dict(arguments)}}


@functools.lru_cache(maxsize=32)
def find_content_format(chat_template: str) -> ContentFormat:
    """Return "openai" if a template walks over the parts of a content, else "string"."""
    extensions = ["jinja2.ext.loopcontrols"]
    try:
        root = jinja2.Environment(extensions=extensions).parse(chat_template)
    except jinja2.TemplateError:  # one with tags of its own: the usual form then
        return "string"
    names = {"content", *_content_variables(root)}
    walks = any(_is_content(loop.iter, names) for loop in root.find_all(nodes.For))
    return "openai" if walks else "string"


def _content_variables(root: nodes.Template) -> Iterator[str]:
    """Names that a template gives to a content: variables, and parameters of macros."""
    for assignment in root.find_all(nodes.Assign):
        target = assignment.target
        if isinstance(target, nodes.Name) and _is_content(assignment.node, set()):
            yield target.name
    macros = {macro.name: macro for macro in root.find_all(nodes.Macro)}
    for call in root.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is not None:
            for parameter, argument in zip(macro.args, call.args, strict=False):
                if _is_content(argument, set()):
                    yield parameter.name


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name in names


def load_chat_template(template: str | Path | None) -> str | None:
    """Return a template's source, given as such or as the path of a file.

    Raises:
        ValueError: If it can only be a path, and there is no such file.
    """
    if template is None:
        return None
    is_source = isinstance(template, str) and any(c in template for c in "{}\n")
    if is_source:
        return str(template)
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"chat_template {str(template)!r} is neither a Jinja template nor a file that can be "
            f"read: {error.strerror}"
        ) from None
