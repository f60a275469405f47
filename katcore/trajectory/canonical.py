"""When two messages are the same, whatever an agent did to them on their way back.

Agents drop reasoning and empty text, serialise arguments anew, rename the ids of tool calls, and move cache
marks. None of that is another conversation.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator

from katcore.schema.call import Message, Tool, ToolCall


def chain(tools: Iterable[Tool], messages: Iterable[Message]) -> Iterator[bytes]:
    """The digest of each beginning of a conversation, from that without messages on."""
    digest = _digest(*(_joined(tool.name, tool.description, tool.parameters) for tool in tools))
    yield digest
    for message in messages:
        digest = extend(digest, message)
        yield digest


def extend(digest: bytes, message: Message) -> bytes:
    """The digest of a conversation with one more message."""
    return _digest(digest, canonical(message))


def canonical(message: Message) -> bytes:
    """A message without what agents change."""
    content = message.content.strip() if message.role == "assistant" else message.content
    calls = (_canonical_call(call) for call in message.tool_calls)
    return _joined(message.role, content, *message.images, *calls)


def _canonical_call(call: ToolCall) -> str:
    try:
        arguments = json.dumps(json.loads(call.arguments), sort_keys=True, separators=(",", ":"))
    except ValueError:
        arguments = call.arguments
    return f"{call.name}({arguments})"


def _joined(*parts: str) -> bytes:
    return b"".join(b"%d:%s" % (len(data), data) for data in (part.encode() for part in parts))


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
