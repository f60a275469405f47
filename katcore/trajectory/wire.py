"""Messages and tools as plain dicts in the form of OpenAI's chat messages."""

import json
from collections.abc import Iterable
from typing import Any

from katcore.schema.call import Message, Tool, ToolCall


def message_dict(message: Message) -> dict[str, Any]:
    """A chat message. With images its content is a list of parts, else a text."""
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        text = [{"type": "text", "text": message.content}] if message.content else []
        images = [{"type": "image_url", "image_url": {"url": url}} for url in message.images]
        entry["content"] = [*text, *images]
    if message.reasoning:
        entry["reasoning_content"] = message.reasoning
    if message.tool_calls:
        entry["tool_calls"] = [_call_dict(call) for call in message.tool_calls]
    if message.role == "tool":
        entry["tool_call_id"] = message.tool_call_id
    return entry


def tool_dicts(tools: Iterable[Tool]) -> list[dict[str, Any]]:
    """Function definitions, their parameters as JSON schemas."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters or "{}"),
            },
        }
        for tool in tools
    ]


def _call_dict(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
