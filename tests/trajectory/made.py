"""Calls of made-up sessions, as the proxy would have recorded them."""

import random
from typing import Any

from hypothesis import strategies as st

from katcore.schema.call import Generation, Message, ModelCall, Sampling
from katcore.schema.rollout import Outcome, Rollout, Verdict
from katcore.trajectory.tree import build_trajectory


def call(
    number: int, new: tuple[int, ...], answer: tuple[int, ...], parent: ModelCall | None = None
) -> ModelCall:
    logprobs = tuple(-(number + 1) / (at + 2) for at in range(len(answer)))
    generation = Generation(answer, logprobs, f"answer {number}", "stop", "3")
    shared = (
        parent.num_shared + len(parent.new_prompt_ids) + len(parent.generation.ids) if parent else 0
    )
    return ModelCall(
        f"c{number}",
        "s",
        parent.call_id if parent else "",
        shared,
        new,
        (Message("user", f"new {number}"),),
        generation,
        Sampling(),
        Sampling(),
        float(number),
        number + 0.5,
    )


def rollout(calls: list[ModelCall], **facts: Any) -> Rollout:
    given: dict[str, Any] = {"outcome": Outcome.SCORED, "verdict": Verdict(1.0)} | facts
    trajectory = build_trajectory("s", calls)
    return Rollout("s", "t", "d", "g", 0, trajectory=trajectory, **given)


@st.composite
def sessions(draw: Any) -> list[ModelCall]:
    """Calls that continue any earlier call, or begin anew; some ask the same again."""
    choose = random.Random(draw(st.integers(0, 10**9)))
    calls: list[ModelCall] = []
    for number in range(choose.randint(1, 9)):
        parent = choose.choice([None, *calls]) if choose.random() < 0.5 else (calls or [None])[-1]
        new = tuple(choose.choices(range(5), k=choose.randint(1, 4)))
        answer = tuple(choose.choices(range(5), k=choose.randint(0, 4)))
        calls.append(call(number, new, answer, parent))
        if choose.random() < 0.2:
            calls[-1] = call(number, calls[0].new_prompt_ids, answer, None)
    return calls


def whole_prompt(calls: list[ModelCall], one: ModelCall) -> tuple[int, ...]:
    """All ids that the engine was given for a call."""
    if not one.parent:
        return one.new_prompt_ids
    parent = next(item for item in calls if item.call_id == one.parent)
    return whole_prompt(calls, parent) + parent.generation.ids + one.new_prompt_ids
