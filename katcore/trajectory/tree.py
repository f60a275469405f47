"""From the calls of one session to the tree of its turns."""

from collections.abc import Sequence

from katcore.schema.call import ModelCall
from katcore.schema.rollout import Trajectory, Turn


def build_trajectory(session_id: str, calls: Sequence[ModelCall]) -> Trajectory:
    """The trajectory of a session: one turn per call, in call order.

    Roles come from structure alone. The path to the last call is `main`; a turn beside it that asked
    the same again (same parent, same new ids) was `discarded`; anything else is `auxiliary`.
    """
    index = {call.call_id: number for number, call in enumerate(calls)}
    parents = [index.get(call.parent, -1) for call in calls]
    main: set[int] = set()
    node = len(calls) - 1
    while node >= 0:
        main.add(node)
        node = parents[node]
    asked = {(parents[number], calls[number].new_prompt_ids) for number in main}
    turns = []
    for number, call in enumerate(calls):
        is_retry = (parents[number], call.new_prompt_ids) in asked
        generation = call.generation
        turns.append(
            Turn(
                parents[number],
                call.new_prompt_ids,
                generation.ids,
                generation.logprobs,
                call.new_messages,
                generation.text,
                generation.policy_version,
                generation.origin,
                "main" if number in main else "discarded" if is_retry else "auxiliary",
            )
        )
    return Trajectory(session_id, tuple(turns))
