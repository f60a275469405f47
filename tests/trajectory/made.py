"""Calls of made-up sessions, as the proxy records them."""

import random
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from katcore.proxy.conversation import Conversations
from katcore.schema.call import Generation, Message, ModelCall, Sampling, Tool
from katcore.schema.rollout import Outcome, Rollout, Verdict
from katcore.trajectory.tree import build_trajectory
from tests.proxy.fakes import END, FakeEngine

TOOLS = (Tool("bash", "runs a command", "{}"),)


def call(
    number: int, new: tuple[int, ...], answer: tuple[int, ...], parent: ModelCall | None = None
) -> ModelCall:
    """A call that goes on from all of `parent`."""
    return ModelCall(
        call_id=f"c{number}",
        session_id="s",
        parent=parent.call_id if parent else "",
        num_shared_messages=parent.num_messages if parent else 0,
        new_messages=(Message("user", f"new {new}"),),
        num_shared=parent.num_ids if parent else 0,
        new_prompt_ids=new,
        generation=Generation(
            answer, logprobs(number, len(answer)), f"answer {number}", "stop", "3"
        ),
        requested=Sampling(),
        used=Sampling(),
        started_s=float(number),
        finished_s=number + 0.5,
    )


def logprobs(number: int, num: int) -> tuple[float, ...]:
    return tuple(-(number + 1) / (at + 2) for at in range(num))


class Recorder:
    """What the proxy keeps of a session, without HTTP and engine: `say` is one call."""

    def __init__(self) -> None:
        self.calls: list[ModelCall] = []
        self.prompts: list[tuple[int, ...]] = []
        self._conversations = Conversations(FakeEngine())

    def say(
        self, messages: Sequence[Message], answer: str | Message, tools: Sequence[Tool] = ()
    ) -> Message:
        """Ask, be answered `answer`, and have it recorded; returns the answer."""
        number = len(self.calls)
        made = Message("assistant", answer) if isinstance(answer, str) else answer
        called = "".join(f"<{call.name}{call.arguments}>" for call in made.tool_calls)
        ids = (*map(ord, made.content + called), END)
        prompt = self._conversations.prompt(messages, tools)
        one = ModelCall(
            call_id=f"c{number}",
            session_id="s",
            parent=prompt.parent,
            num_shared_messages=prompt.num_shared_messages,
            new_messages=prompt.messages[prompt.num_shared_messages :],
            num_shared=prompt.num_shared,
            new_prompt_ids=prompt.ids[prompt.num_shared :],
            generation=Generation(
                ids,
                logprobs(number, len(ids)),
                made.content,
                "stop",
                "3",
                tool_calls=made.tool_calls,
            ),
            requested=Sampling(),
            used=Sampling(),
            started_s=float(number),
            finished_s=number + 0.5,
            num_retokenised=prompt.num_retokenised,
            tools=None if prompt.parent else tuple(tools),
        )
        self._conversations.record(one, prompt)
        self.calls.append(one)
        self.prompts.append(prompt.ids)
        return made


def rollout(calls: list[ModelCall], **facts: Any) -> Rollout:
    given: dict[str, Any] = {"outcome": Outcome.SCORED, "verdict": Verdict(1.0)} | facts
    trajectory = build_trajectory("s", calls)
    return Rollout("s", "t", "d", "g", 0, trajectory=trajectory, **given)


@st.composite
def sessions(draw: Any) -> Recorder:
    """Agents that go on, ask again, fork, begin anew, rewrite history, and end with a passing remark."""
    choose = random.Random(draw(st.integers(0, 10**9)))
    recorder = Recorder()
    histories: list[list[Message]] = []
    for _ in range(choose.randint(1, 9)):
        what = choose.choice(("on", "on", "on", "again", "fork", "anew", "rewrite", "remark"))
        history = list(choose.choice(histories[-2:])) if histories else []
        if what == "anew" or not history:
            history = [Message("system", choose.choice("ab"))] if choose.random() < 0.5 else []
        elif what == "again":
            history = history[:-2]
        elif what == "fork":
            history = history[: choose.randrange(len(history))]
        elif what == "rewrite":
            at = choose.randrange(len(history))
            history[at] = Message(history[at].role, choose.choice("xyz"))
        if what != "again" or not history or history[-1].role == "assistant":
            history.append(Message("user", choose.choice(("u", "v", "w" * 9))))
        passing = [Message("user", "remark")] if what == "remark" else []
        tools = TOOLS if choose.random() < 0.8 else ()
        answer = recorder.say([*history, *passing], choose.choice(("", "k", "l", "mn")), tools)
        histories.append([*history, answer])
    return recorder


def whole_prompt(calls: list[ModelCall], one: ModelCall) -> tuple[int, ...]:
    """All ids that the engine was given for a call, from what the log holds."""
    if not one.parent:
        return one.new_prompt_ids
    parent = next(item for item in calls if item.call_id == one.parent)
    conversation = whole_prompt(calls, parent) + parent.generation.ids
    return conversation[: one.num_shared] + one.new_prompt_ids
