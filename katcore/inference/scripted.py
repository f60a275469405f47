"""The scripted engine: replays a programme of turns, so that an oracle is captured like any agent."""

from collections.abc import Iterable, Sequence

from katcore.errors import EngineError
from katcore.inference.chat import ChatTokenizer
from katcore.schema.call import EngineRequest, Generation, Message, Tool, ToolCall

POLICY = "scripted"
Turn = str | tuple[ToolCall, ...]
"""What is said next: a text, or the tool calls to make."""


class ScriptedEngine:
    """Answers a conversation that has n answers with turn n of its programme."""

    def __init__(self, chat: ChatTokenizer, turns: Sequence[Turn]) -> None:
        self._chat = chat
        self._turns = turns

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return self._chat.encode(messages, tools=tools, start=start)

    def token_texts(self, ids: Iterable[int]) -> dict[int, str]:
        """See `SupportsTokens.token_texts`."""
        return self._chat.token_texts(ids)

    async def generate(self, request: EngineRequest) -> Generation:
        """See `Engine.generate`. The ids are tokenised once, here, and marked as scripted."""
        turn = self._turn(request)
        text, calls = (turn, ()) if isinstance(turn, str) else ("", turn)
        answer = Message("assistant", text, tool_calls=calls)
        ids = self._chat.answer_ids(answer, request.tools, request.messages)
        logprobs = (0.0,) * len(ids)
        return Generation(ids, logprobs, text, "stop", POLICY, "scripted", tool_calls=calls)

    def _turn(self, request: EngineRequest) -> Turn:
        number = sum(message.role == "assistant" for message in request.messages)
        if number >= len(self._turns):
            raise EngineError(f"session {request.session_id}: its programme has no turn {number}")
        return self._turns[number]
