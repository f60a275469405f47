"""An engine that speaks code points."""

import asyncio
from collections.abc import Sequence

from katcore.schema.call import EngineRequest, Generation, Message, Tool

END, ASSISTANT = 3, 2
_MARKS = {"system": 4, "user": 5, "assistant": ASSISTANT, "tool": 6}


class FakeEngine:
    """Gives its answers in turn, then "ok"; an answer that is an exception is raised.

    One id per character, so that a text and its ids can be compared by eye.
    """

    def __init__(self, *answers: str | Message | Exception, finish: str = "stop") -> None:
        self.answers = list(answers)
        self.finish = finish
        self.requests: list[EngineRequest] = []
        self.delay_s = 0.0
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        ids: list[int] = []
        for message in messages[start:]:
            called = "".join(f"<{call.name}{call.arguments}>" for call in message.tool_calls)
            ids += [_MARKS[message.role], *map(ord, message.content + called), END]
        return (*ids, ASSISTANT)

    async def generate(self, request: EngineRequest) -> Generation:
        self.requests.append(request)
        self.asked.set()
        await asyncio.sleep(self.delay_s)
        await self.go.wait()
        answer = self.answers.pop(0) if self.answers else "ok"
        if isinstance(answer, Exception):
            raise answer
        made = Message("assistant", answer) if isinstance(answer, str) else answer
        is_cut = self.finish == "length"
        called = "".join(f"<{call.name}{call.arguments}>" for call in made.tool_calls)
        thought = f"({made.reasoning})" if made.reasoning else ""
        ids = (*map(ord, thought + made.content + called), *(() if is_cut else (END,)))
        return Generation(
            ids,
            tuple(-0.5 - 0.25 * n for n in range(len(ids))),
            made.content,
            "length" if is_cut else "stop",
            "7",
            reasoning=made.reasoning,
            tool_calls=made.tool_calls,
        )


def text_of(ids: Sequence[int]) -> str:
    """Readable: | for the end of a message, and a letter for who speaks."""
    marks = {END: "|", ASSISTANT: "A:", 4: "S:", 5: "U:", 6: "T:"}
    return "".join(marks.get(number, chr(number)) for number in ids)
