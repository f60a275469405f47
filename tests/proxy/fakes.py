"""An engine that speaks code points."""

import asyncio
from collections.abc import Sequence

from katcore.schema.call import EngineRequest, Generation, Message

END, ASSISTANT = 3, 2
_MARKS = {"system": 4, "user": 5, "assistant": ASSISTANT}


class FakeEngine:
    """Gives its answers in turn, then "ok"; an answer that is an exception is raised.

    One id per character, so that a text and its ids can be compared by eye.
    """

    def __init__(self, *answers: str | Exception, finish: str = "stop") -> None:
        self.answers = list(answers)
        self.finish = finish
        self.requests: list[EngineRequest] = []
        self.go = asyncio.Event()
        self.go.set()

    def encode(self, messages: Sequence[Message], *, is_continuation: bool) -> tuple[int, ...]:
        ids: list[int] = []
        for message in messages:
            ids += [_MARKS[message.role], *map(ord, message.content), END]
        return (*ids, ASSISTANT)

    async def generate(self, request: EngineRequest) -> Generation:
        self.requests.append(request)
        await self.go.wait()
        answer = self.answers.pop(0) if self.answers else "ok"
        if isinstance(answer, Exception):
            raise answer
        is_cut = self.finish == "length"
        ids = (*map(ord, answer), *(() if is_cut else (END,)))
        logprobs = tuple(-0.5 - 0.25 * n for n in range(len(ids)))
        return Generation(ids, logprobs, answer, "length" if is_cut else "stop", "7")


def text_of(ids: Sequence[int]) -> str:
    """Readable: | for the end of a message, and a letter for who speaks."""
    marks = {END: "|", ASSISTANT: "A:", 4: "S:", 5: "U:"}
    return "".join(marks.get(number, chr(number)) for number in ids)
