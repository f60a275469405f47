"""Token rows: one plain sequence per root-to-leaf path of the token tree, for trainers that know no trees."""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from katcore.schema.rollout import Rollout, TurnRole
from katcore.schema.sample import Sample
from katcore.trajectory.formats import TRAINED, tree_sample

Row = dict[str, Any]


class RowsConfig(BaseModel):
    """Options of `rows`: which roles are trained; how long a row may be in tokens (0: any length)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: tuple[TurnRole, ...] = TRAINED
    max_tokens: int = 0


class RowsFormatter:
    """Rows of scored rollouts; each sampled token is trained in the first row that holds it, and in no other.

    A row begins to be a completion with the first token that a turn sampled on its path.
    """

    def __init__(self, config: RowsConfig) -> None:
        self._config = config

    def samples(self, rollouts: Iterable[Rollout]) -> Iterator[Row]:
        """See `Formatter.samples`."""
        for rollout in rollouts:
            sample = None
            if rollout.reward is not None:
                sample = tree_sample(rollout, self._config.roles)
            if sample:
                yield from self._rows(rollout, sample)

    def _rows(self, rollout: Rollout, sample: Sample) -> Iterator[Row]:
        taken: set[int] = set()
        branch = 0
        for path in _paths(sample):
            mask = [int(sample.trained[at] and at not in taken) for at in path]
            if not any(mask) or 0 < self._config.max_tokens < len(path):
                continue
            taken.update(path)
            start = next(n for n, at in enumerate(path) if sample.trained[at])
            yield {
                "rollout_id": rollout.id,
                "task_id": rollout.task_id,
                "group": rollout.group,
                "branch": branch,
                "domain": rollout.domain,
                "reward": rollout.reward,
                "origin": sample.origin,
                "policy_version": sample.policy_version,
                "prompt_token_ids": [sample.tokens[at] for at in path[:start]],
                "completion_token_ids": [sample.tokens[at] for at in path[start:]],
                "logprobs": [sample.logprobs[at] for at in path[start:]],
                "loss_mask": mask[start:],
            }
            branch += 1


def _paths(sample: Sample) -> Iterator[list[int]]:
    """The token numbers of each path, leaf by leaf in depth-first order."""
    inner = set(sample.parents)
    for leaf in range(len(sample.tokens)):
        if leaf in inner:
            continue
        path: list[int] = []
        at = leaf
        while at >= 0:
            path.append(at)
            at = sample.parents[at]
        yield path[::-1]
