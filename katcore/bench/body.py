"""Bodies of requests as agents send them, in each dialect, with the whole history every time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from katcore.bench.exchange import MODEL
from katcore.proxy import anthropic_messages, chat_completions, responses
from katcore.proxy.dialect import Dialect
from katcore.schema.call import Message, Tool
from katcore.trajectory.wire import message_dict, tool_dicts

Body = dict[str, Any]


def _chat(messages: Sequence[Message], tools: Sequence[Tool]) -> Body:
    said = [message_dict(message) for message in messages]
    return {"model": MODEL, "messages": said, "tools": tool_dicts(tools), "stream": True}


def _responses(messages: Sequence[Message], tools: Sequence[Tool]) -> Body:
    system, rest = messages[0], messages[1:]
    items: list[Body] = []
    for message in rest:
        if message.role == "tool":
            items.append(
                {
                    "type": "function_call_output",
                    "call_id": message.tool_call_id,
                    "output": message.content,
                }
            )
            continue
        kind = "output_text" if message.role == "assistant" else "input_text"
        part = {"type": kind, "text": message.content}
        items.append({"type": "message", "role": message.role, "content": [part]})
        items += [
            {
                "type": "function_call",
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
            }
            for call in message.tool_calls
        ]
    offered = [{"type": "function", **entry["function"]} for entry in tool_dicts(tools)]
    return {
        "model": MODEL,
        "instructions": system.content,
        "input": items,
        "tools": offered,
        "stream": True,
    }


def _anthropic(messages: Sequence[Message], tools: Sequence[Tool]) -> Body:
    system, rest = messages[0], messages[1:]
    turns: list[Body] = []
    for message in rest:
        block: Body = {"type": "text", "text": message.content}
        if message.role == "tool":
            block = {
                "type": "tool_result",
                "tool_use_id": message.tool_call_id,
                "content": message.content,
            }
        uses = [
            {
                "type": "tool_use",
                "id": call.id,
                "name": call.name,
                "input": orjson.loads(call.arguments),
            }
            for call in message.tool_calls
        ]
        role = "assistant" if message.role == "assistant" else "user"
        turns.append({"role": role, "content": [block, *uses]})
    offered = [
        {
            "name": tool.name,
            "description": tool.description,
            "input_schema": orjson.loads(tool.parameters),
        }
        for tool in tools
    ]
    return {
        "model": MODEL,
        "max_tokens": 4096,
        "system": [{"type": "text", "text": system.content}],
        "messages": turns,
        "tools": offered,
        "stream": True,
    }


DIALECTS: Mapping[str, tuple[Dialect, Callable[[Sequence[Message], Sequence[Tool]], Body]]] = {
    "chat-completions": (chat_completions, _chat),
    "responses": (responses, _responses),
    "anthropic-messages": (anthropic_messages, _anthropic),
}
"""Each dialect, and what makes a body of it: the first message is the system's."""
