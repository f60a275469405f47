"""What is said in a turn as HTML: messages, images, tool calls, and the tools on offer.

All of it is untrusted text, and may be long: what is long is collapsed, and what is huge is cut off.
"""

import json
import re
from collections.abc import Iterable

from katcore.pipeline.chart import escape
from katcore.schema.call import Message, Tool, ToolCall

_LONG_CHARS, _LONG_LINES = 1500, 25
_MAX_CHARS = 100_000
_SUMMARY_CHARS = 100
_IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,([A-Za-z0-9+/]+={0,2})")


class Room:
    """How many characters of images a page still takes. Images are most of what can make it heavy."""

    def __init__(self, num_chars: int = 16 << 20) -> None:
        self._num_left = num_chars

    def takes(self, text: str) -> bool:
        """Whether `text` still fits; if so, its room is taken."""
        fits = len(text) <= self._num_left
        self._num_left -= len(text) if fits else 0
        return fits


def message(said: Message, room: Room) -> str:
    """A message of the prompt."""
    to = f" to call <code>{escape(said.tool_call_id)}</code>" if said.tool_call_id else ""
    return (
        f'<div class="message {escape(said.role)}"><h4>{escape(said.role)}{to}</h4>'
        f"{_said(said)}{''.join(_image(url, room) for url in said.images)}</div>"
    )


def answer(said: Message) -> str:
    """What the model answered."""
    body = _said(said) or "<p>(nothing)</p>"
    return f'<div class="message answer"><h4>answer</h4>{body}</div>'


def tools(offered: Iterable[Tool]) -> str:
    """Tools on offer, collapsed."""
    items = [
        f"<h4><code>{escape(tool.name)}</code></h4>{block(tool.description)}"
        f"{block(_pretty(tool.parameters))}"
        for tool in offered
    ]
    if not items:
        return "<p class=facts>No tools are offered.</p>"
    offer = "1 tool is" if len(items) == 1 else f"{len(items)} tools are"
    body = "".join(items)
    return f"<details><summary>{offer} offered</summary><div class=inside>{body}</div></details>"


def block(text: str, name: str = "") -> str:
    """Text as it is; collapsed if it is long, nothing if it is empty. `name` is a CSS class."""
    if not text:
        return ""
    num_chars, num_lines = len(text), text.count("\n") + 1
    # A browser drops a line end at the very beginning of a <pre>; so it gets one to drop.
    shown = f'<pre class="{name}">\n{_cut(text, _MAX_CHARS)}</pre>'
    if num_chars <= _LONG_CHARS and num_lines <= _LONG_LINES:
        return shown
    first = _cut(text.lstrip()[: 10 * _SUMMARY_CHARS].partition("\n")[0], _SUMMARY_CHARS, " ...")
    size = f"{num_chars:,} characters, {num_lines:,} lines"
    return f"<details><summary>{first} <small>{size}</small></summary>{shown}</details>"


def _said(said: Message) -> str:
    reasoning = block(said.reasoning, "reasoning")
    if reasoning:
        reasoning = f"<h5>reasoning</h5>{reasoning}"
    calls = "".join(_call(call) for call in said.tool_calls)
    return f"{reasoning}{block(said.content)}{calls}"


def _call(call: ToolCall) -> str:
    number = f" <code>{escape(call.id)}</code>" if call.id else ""
    return (
        f"<div class=call><h5>calls <b>{escape(call.name)}</b>{number}</h5>"
        f"{_arguments(call.arguments)}</div>"
    )


def _arguments(text: str) -> str:
    """Arguments one by one, strings as they are; what is no JSON object is shown whole."""
    try:
        found = json.loads(text) if len(text) <= _MAX_CHARS else None
        if not isinstance(found, dict) or not found:
            return block(_pretty(text))
        values = [
            value if isinstance(value, str) and value else _dump(value) for value in found.values()
        ]
    except (ValueError, RecursionError):
        return block(text)
    rows = (
        f"<dt>{escape(name)}</dt><dd>{block(value)}</dd>"
        for name, value in zip(found, values, strict=True)
    )
    return f"<dl>{''.join(rows)}</dl>"


def _pretty(text: str) -> str:
    """JSON with a line for each value; anything else as it is."""
    try:
        return _dump(json.loads(text)) if len(text) <= _MAX_CHARS else text
    except (ValueError, RecursionError):
        return text


def _dump(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _image(url: str, room: Room) -> str:
    if not (found := _IMAGE.fullmatch(url)):
        return f"<p>(image) not shown: <code>{_cut(url, _SUMMARY_CHARS)}</code></p>"
    kind, data = found.groups()
    size = f"{kind}, {len(data) * 3 / 4 / 1024:,.1f} KiB"
    if not room.takes(url):
        return f"<p>(image) {size}; left out, for the page has too many</p>"
    return f'<p>(image) {size}<br><img alt="image" src="{url}"></p>'


def _cut(text: str, num_chars: int, more: str = "") -> str:
    """The beginning of a text as HTML, with a note of what is left out."""
    if len(text) <= num_chars:
        return escape(text)
    return escape(text[:num_chars]) + (more or f" [{len(text) - num_chars:,} more characters]")
