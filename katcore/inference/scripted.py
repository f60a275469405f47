"""The scripted engine: replays a programme of turns, so that an oracle is captured like any agent."""

from collections.abc import Sequence

from katcore.errors import EngineError
from katcore.inference.chat import ChatTokenizer
from katcore.schema.call import EngineRequest, Generation, Message

POLICY = "scripted"


class ScriptedEngine:
    """Answers a conversation that has n answers with turn n of its programme."""

    def __init__(self, chat: ChatTokenizer, turns: tuple[str, ...]) -> None:
        self._chat = chat
        self._turns = turns

    def encode(self, messages: Sequence[Message], *, is_continuation: bool) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return self._chat.encode(messages, is_continuation=is_continuation)

    async def generate(self, request: EngineRequest) -> Generation:
        """See `Engine.generate`. The ids are tokenised once, here, and marked as scripted."""
        number = sum(message.role == "assistant" for message in request.messages)
        if number >= len(self._turns):
            raise EngineError(f"session {request.session_id}: its programme has no turn {number}")
        text = self._turns[number]
        ids = self._chat.text_ids(text)
        return Generation(ids, (0.0,) * len(ids), text, "stop", POLICY, "scripted")
