"""The items of /v1/responses -> messages of a chat, and back."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.server.errors import ApiError
from jaxengine.server.parsers.deltas import ParsedOutput
from jaxengine.server.protocol.chat import ChatRequest
from jaxengine.server.protocol.responses import ResponsesRequest

_SHARED = (
    *("temperature", "top_p", "top_k", "seed", "stop_token_ids", "stream", "priority"),
    *("cache_salt", "parallel_tool_calls"),
)


def new_item_id(prefix: str) -> str:
    """Name an item of an output."""
    return f"{prefix}_{secrets.token_hex(16)}"


def chat_request_of(body: ResponsesRequest, messages: Sequence[Mapping[str, Any]]) -> ChatRequest:
    """Return the same request in the form of a chat.

    Args:
        body: The request.
        messages: Of its input and of the responses before it.

    Raises:
        ApiError: If it asks for tools that are no functions.
    """
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    values: dict[str, Any] = {name: getattr(body, name) for name in _SHARED}
    values.update(
        messages=[*system, *messages],
        max_completion_tokens=body.max_output_tokens,
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=_tool_choice(body.tool_choice),
        response_format=_response_format(body.text),
        reasoning_effort=(body.reasoning or {}).get("effort"),
    )
    return ChatRequest.model_validate({k: v for k, v in values.items() if v is not None})


def messages_of(items: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of input or output items.

    Raises:
        ApiError: If one is of a kind that is not text or a function.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            content = item.get("content")
            messages.append({"role": item.get("role", "user"), "content": content})
        elif kind == "function_call":
            _add_call(messages, item)
        elif kind == "function_call_output":
            result = {"role": "tool", "tool_call_id": item.get("call_id")}
            messages.append({**result, "content": str(item.get("output", ""))})
        elif kind != "reasoning":
            raise ApiError(f"an item of type {kind!r} is not supported", param="input")
    return messages


def items_of(parsed: ParsedOutput) -> list[dict[str, Any]]:
    """Write a whole output as items."""
    items: list[dict[str, Any]] = []
    if parsed.reasoning:
        items.append(reasoning_item(new_item_id("rs"), parsed.reasoning))
    if parsed.content is not None or not parsed.tool_calls:
        items.append(message_item(new_item_id("msg"), parsed.content or ""))
    items += [
        call_item(new_item_id("fc"), call.id, call.name, call.arguments)
        for call in parsed.tool_calls
    ]
    return items


def message_item(item_id: str, text: str, status: str = "completed") -> dict[str, Any]:
    """Write text as an item."""
    return {
        "id": item_id,
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [text_part(text)] if status == "completed" else [],
    }


def text_part(text: str) -> dict[str, Any]:
    """Write the part of a message that is its text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def reasoning_item(item_id: str, text: str, status: str = "completed") -> dict[str, Any]:
    """Write reasoning as an item."""
    content = [{"type": "reasoning_text", "text": text}] if text else []
    values = {"id": item_id, "type": "reasoning", "summary": [], "content": content}
    return {**values, "status": status}


def call_item(
    item_id: str, call_id: str, name: str, arguments: str, status: str = "completed"
) -> dict[str, Any]:
    """Write a call of a function as an item."""
    return {
        "id": item_id,
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def _add_call(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Put a call into the assistant's message before it, or into one of its own."""
    call = {
        "id": item.get("call_id"),
        "type": "function",
        "function": {"name": str(item.get("name")), "arguments": item.get("arguments") or "{}"},
    }
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise ApiError(f"only tools of type function are supported, got {tool!r:.100}")
    function = tool.get("function") or {k: v for k, v in tool.items() if k != "type"}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _response_format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    described = (text or {}).get("format")
    if not isinstance(described, Mapping):
        return None
    if described.get("type") == "json_schema" and "json_schema" not in described:
        return {"type": "json_schema", "json_schema": dict(described)}
    return dict(described)
