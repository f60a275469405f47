"""Answers that came to nothing: their tool call was refused or failed."""

from collections.abc import Sequence

from katcore.schema.call import Message


def has_failed(
    after: Sequence[Message], beginnings: tuple[str, ...], *, has_tool_calls: bool
) -> bool:
    """Whether what came `after` an answer begins as failures do.

    After tool calls that is any of their results; after a text, what was said next.
    """
    results = [message for message in after if message.role == "tool"]
    if not has_tool_calls:
        results = list(after[:1])
    return any(message.content.startswith(beginnings) for message in results)
