"""Trajectories as training samples: pure functions of the call log."""

from collections.abc import Iterable, Iterator

from pydantic import BaseModel, ConfigDict

from katcore.schema.call import Origin
from katcore.schema.rollout import Rollout, Turn
from katcore.schema.sample import Sample


class TreeConfig(BaseModel):
    """Options of the tree formatter. `max_tokens`: longer samples are left out (0: none are)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int = 0


class TreeFormatter:
    """One token tree per scored rollout; each sampled token once, context tokens never trained.

    Discarded turns are left out.
    """

    def __init__(self, config: TreeConfig) -> None:
        self._max_tokens = config.max_tokens

    def samples(self, rollouts: Iterable[Rollout]) -> Iterator[Sample]:
        """See `Formatter.samples`."""
        for rollout in rollouts:
            sample = tree_sample(rollout) if rollout.reward is not None else None
            if sample and (not self._max_tokens or len(sample.tokens) <= self._max_tokens):
                yield sample


def tree_sample(rollout: Rollout) -> Sample | None:
    """The token tree of a rollout in depth-first order; None if it holds no turn that counts."""
    turns = rollout.trajectory.turns
    children: dict[int, list[int]] = {}
    for number, turn in enumerate(turns):
        if turn.role != "discarded":
            children.setdefault(turn.parent, []).append(number)
    tokens: list[int] = []
    parents: list[int] = []
    trained: list[bool] = []
    logprobs: list[float] = []
    branches: list[int] = []
    stack = [(number, -1) for number in reversed(children.get(-1, []))]
    while stack:
        number, last = stack.pop()
        turn = turns[number]
        for is_trained, ids in ((False, turn.prompt_ids), (True, turn.ids)):
            for token in ids:
                parents.append(last)
                last = len(tokens)
                tokens.append(token)
                trained.append(is_trained)
        logprobs += [0.0] * len(turn.prompt_ids) + list(turn.logprobs)
        leaves = _leaves(number, children)
        branches += [leaves] * (len(turn.prompt_ids) + len(turn.ids))
        stack += [(child, last) for child in reversed(children.get(number, []))]
    if not any(trained):
        return None
    return Sample(
        tuple(tokens),
        tuple(parents),
        tuple(trained),
        tuple(logprobs),
        tuple(branches),
        rollout.id,
        rollout.task_id,
        rollout.domain,
        rollout.reward,
        _origin(turns),
        turns[-1].policy_version,
    )


def _leaves(number: int, children: dict[int, list[int]]) -> int:
    count, stack = 0, [number]
    while stack:
        below = children.get(stack.pop(), [])
        count += not below
        stack += below
    return count


def _origin(turns: tuple[Turn, ...]) -> Origin:
    origins = {turn.origin for turn in turns}
    return origins.pop() if len(origins) == 1 else "tokenised"
