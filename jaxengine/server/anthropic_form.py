"""Anthropic's messages -> a chat request, and the reasons of its ends."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.server.errors import ApiError
from jaxengine.server.protocol.chat import ChatRequest
from jaxengine.server.protocol.messages import InputMessage, MessagesRequest

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request_of(body: MessagesRequest) -> ChatRequest:
    """Return the same request in OpenAI's form.

    Raises:
        ApiError: If it holds what is not text or tools.
    """
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        messages += _messages(message)
    choice = body.tool_choice or {}
    values: dict[str, Any] = {
        "messages": messages,
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "stream": body.stream,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _tool_choice(choice),
        "parallel_tool_calls": not choice.get("disable_parallel_tool_use", False),
    }
    return ChatRequest.model_validate({k: v for k, v in values.items() if v is not None})


def stop_reason_of(
    reason: str | None, stop_reason: int | str | None, has_calls: bool
) -> dict[str, Any]:
    """Say why a message has ended."""
    if has_calls and reason in ("stop", "tool_calls"):
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _messages(message: InputMessage) -> list[dict[str, Any]]:
    """A turn; results of tools are messages of their own, in front of the rest."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, texts, calls, thoughts = [], [], [], []
    for block in message.content:
        kind = block.get("type")
        if kind == "text":
            texts.append(str(block.get("text", "")))
        elif kind == "tool_use":
            calls.append(_call(block))
        elif kind == "tool_result":
            content = _text(block.get("content") or "")
            named = {"role": "tool", "tool_call_id": block.get("tool_use_id")}
            results.append({**named, "content": content})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            raise ApiError(f"a block of type {kind!r} is not supported: models here read text only")
    own: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if calls:
        own["tool_calls"] = calls
    if thoughts:
        own["reasoning"] = "\n".join(thoughts)
    has_own = texts or calls or thoughts or not results
    return [*results, own] if has_own else results


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        if not isinstance(block, Mapping) or block.get("type") != "text":
            raise ApiError(f"only text blocks are supported, got {block!r:.100}")
        texts.append(str(block.get("text", "")))
    return "\n".join(texts)


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(block.get("input") or {})
    function = {"name": str(block.get("name")), "arguments": arguments}
    return {"id": block.get("id"), "type": "function", "function": function}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": tool.get("name"),
            "description": tool.get("description", ""),
            "parameters": tool.get("input_schema") or {"type": "object", "properties": {}},
        },
    }


def _tool_choice(choice: Mapping[str, Any]) -> Any:
    kind = choice.get("type")
    if kind is None:
        return None
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind not in _CHOICES:
        raise ApiError(f"tool_choice must be of type auto, any, tool or none, got {kind!r}")
    return _CHOICES[kind]
