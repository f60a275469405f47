"""A made-up agent that talks through the proxy's capture: the same seed gives the same session.

It works with tools, and now and then asks again, cuts an old output short, starts a sub-agent, or puts its
history into a summary, as agents do.
"""

import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from katcore.bench.body import DIALECTS, Body
from katcore.proxy.capture import Capture, Source
from katcore.proxy.session import Budget, Session, SessionSpec
from katcore.schema.call import (
    EngineRequest,
    Generation,
    Message,
    ModelCall,
    Sampling,
    Tool,
    ToolCall,
)
from katcore.trajectory.calls import CallLog

SESSION = "bench"
_ENDLESS = Budget(max_calls=1 << 30, max_tokens=1 << 40, seconds=1e9)
_NUM_TOOLS = 12
_VOCABULARY = 50_000
_MARKS = {"system": 0, "user": 1, "assistant": 2, "tool": 3}
_END = 4
_CHARS_PER_ID = 4
_LETTERS = "etaoinshrdlucmfwypvbgk      \n{}()=._:/\"'0123456789"


class Every(NamedTuple):
    """After so many turns each happens once more."""

    again: int = 25
    cut: int = 60
    subagent: int = 40
    compaction: int = 250


SELDOM = Every()

_INNER = 8
_OUTPUT = 520
"""Characters of a tool's output."""


class TalkEngine:
    """Says what it was told to say next; an id for every four characters."""

    def __init__(self, choose: random.Random) -> None:
        self.next = Message("assistant", "")
        self._choose = choose

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        """See `Engine.encode`."""
        ids: list[int] = []
        if not start:
            for tool in tools:
                ids += _ids(f"{tool.name}{tool.description}{tool.parameters}")
        for message in messages[start:]:
            ids += [_MARKS[message.role], *_ids(_spoken(message)), _END]
        return (*ids, _MARKS["assistant"])

    async def generate(self, request: EngineRequest) -> Generation:
        """See `Engine.generate`. Log-probabilities are 32-bit numbers, with all their digits."""
        made = self.next
        ids = (*_ids(_spoken(made)), _END)
        doubles = [-self._choose.expovariate(2.0) for _ in ids]
        logprobs = struct.unpack(f"{len(ids)}f", struct.pack(f"{len(ids)}f", *doubles))
        calls = made.tool_calls
        return Generation(ids, logprobs, made.content, "stop", "1", tool_calls=calls)


class Agent:
    """Records a session into `log`."""

    def __init__(self, log: Path, dialect: str, seed: int) -> None:
        self._dialect = dialect
        self._parse, self._body = DIALECTS[dialect][0].parse, DIALECTS[dialect][1]
        self._choose = random.Random(seed)
        self._engine = TalkEngine(self._choose)
        self._log = CallLog(log)
        self._capture = Capture(self._log)
        spec = SessionSpec(SESSION, self._engine, Sampling(max_tokens=4096), _ENDLESS)
        self._session = Session(spec)
        self._tools = tuple(self._tool(number) for number in range(_NUM_TOOLS))
        self.last_body: Body = {}

    @property
    def calls(self) -> list[ModelCall]:
        """What is on record so far."""
        return self._session.calls

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    async def work(self, num_calls: int) -> None:
        """Go on, with all that agents do, until there are `num_calls` calls or a few more."""
        history = self._begun("")
        turn = 0
        while len(self.calls) < num_calls:
            turn += 1
            if turn % SELDOM.compaction == 0:
                history = await self._compacted(history)
            if turn % SELDOM.cut == 0:
                self._cut(history)
            if turn % SELDOM.again == 0:
                await self._say(history)
            answer = await self._say(history)
            result = self._text(_OUTPUT)
            if turn % SELDOM.subagent == 0:
                result = await self._delegated(answer)
            history += [answer, self._result(answer, result)]

    async def converse(self, num_calls: int) -> int:
        """One plain conversation of `num_calls` calls; returns the bytes of all its requests."""
        history, sent = self._begun(""), 0
        for _ in range(num_calls):
            answer = await self._say(history)
            sent += len(orjson.dumps(self.last_body))
            history += [answer, self._result(answer, self._text(_OUTPUT))]
        return sent

    def _begun(self, summary: str) -> list[Message]:
        task = summary or self._text(600)
        return [Message("system", self._text(1600)), Message("user", task)]

    async def _say(self, history: Sequence[Message], *, is_calling: bool = True) -> Message:
        number = len(self.calls)
        call = ToolCall(
            f"call_{number}",
            f"tool_{self._choose.randrange(_NUM_TOOLS)}",
            f'{{"argument":"{self._choose.getrandbits(96):x}"}}',
        )
        calls = (call,) if is_calling else ()
        self._engine.next = Message("assistant", self._text(160), tool_calls=calls)
        self.last_body = self._body(history, self._tools)
        source = Source(self._dialect, self.last_body)
        await self._capture.call(self._session, self._parse(self.last_body), source)
        return self._engine.next

    async def _delegated(self, answer: Message) -> str:
        """What a sub-agent found, which had the argument of the call as its task."""
        task = answer.tool_calls[0].arguments
        history = [Message("system", self._text(800)), Message("user", f"{task} {self._text(200)}")]
        found = "nothing"
        for _ in range(_INNER):
            said = await self._say(history)
            found = said.content
            history += [said, self._result(said, self._text(_OUTPUT))]
        return found

    async def _compacted(self, history: list[Message]) -> list[Message]:
        """A new history, that begins with a summary of this one."""
        wish = Message("user", "Put all this into a summary.")
        summary = await self._say([*history, wish], is_calling=False)
        return self._begun(summary.content)

    def _cut(self, history: list[Message]) -> None:
        """Cut short an output a few turns back; all that follows it is another prompt from there on."""
        outputs = [at for at, message in enumerate(history) if message.role == "tool"]
        if len(outputs) > 3:
            at = outputs[-3]
            history[at] = Message("tool", "[cut short]", tool_call_id=history[at].tool_call_id)

    def _result(self, answer: Message, text: str) -> Message:
        return Message("tool", text, tool_call_id=answer.tool_calls[0].id)

    def _tool(self, number: int) -> Tool:
        schema = (
            '{"type":"object","properties":{"argument":{"type":"string"}},"required":["argument"]}'
        )
        return Tool(f"tool_{number}", self._text(240), schema)

    def _text(self, num_chars: int) -> str:
        return "".join(self._choose.choices(_LETTERS, k=num_chars)).strip()


def _spoken(message: Message) -> str:
    called = "".join(f"<{call.name}{call.arguments}>" for call in message.tool_calls)
    return message.content + called


def _ids(text: str) -> list[int]:
    data = text.encode()
    pieces = (data[at : at + _CHARS_PER_ID] for at in range(0, len(data), _CHARS_PER_ID))
    return [_END + 1 + int.from_bytes(piece) % _VOCABULARY for piece in pieces]
