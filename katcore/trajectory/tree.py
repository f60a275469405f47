"""From the calls of one session to the tree of its turns."""

from collections.abc import Sequence

from katcore.schema.call import ModelCall
from katcore.schema.rollout import Trajectory, Turn
from katcore.trajectory.roles import find_roles


def build_trajectory(session_id: str, calls: Sequence[ModelCall]) -> Trajectory:
    """The trajectory of a session: one turn per call, in call order."""
    index = {call.call_id: number for number, call in enumerate(calls)}
    turns = [
        Turn(
            parent=index.get(call.parent, -1),
            num_shared_messages=call.num_shared_messages,
            num_shared=call.num_shared,
            prompt_ids=call.new_prompt_ids,
            ids=call.generation.ids,
            logprobs=call.generation.logprobs,
            messages=call.new_messages,
            text=call.generation.text,
            policy_version=call.generation.policy_version,
            origin=call.generation.origin,
            role=role,
            reasoning=call.generation.reasoning,
            tool_calls=call.generation.tool_calls,
            tools=call.tools,
            is_exact=call.is_exact,
            started_s=call.started_s,
            seconds=call.finished_s - call.started_s,
        )
        for call, role in zip(calls, find_roles(calls), strict=True)
    ]
    return Trajectory(session_id, tuple(turns))
