"""One row of training data: a token tree."""

from collections.abc import Sequence
from dataclasses import dataclass

from katcore.schema.call import Origin


@dataclass(frozen=True, slots=True)
class Sample:
    """A token tree in depth-first order, T tokens.

    `parents[t]` is the index of the token before `t` on its path (-1 for the first token), so a plain
    sequence is (-1, 0, 1, ...). `trained[t]` marks tokens the policy produced; every other token is
    context. `logprobs[t]` is the behaviour policy's log-probability (0 where not sampled).
    `branches[t]` counts the root-to-leaf paths through `t` (g_t of Tree Training). `failed` are answers, in
    the order of the tree, that came to nothing: their tool call was refused or failed. `versions` are the
    policy versions of the answers, in the same order, each of all of an answer's tokens; () where all are of
    `policy_version`.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    trained: tuple[bool, ...]
    logprobs: tuple[float, ...]
    branches: tuple[int, ...]
    rollout_id: str
    task_id: str
    domain: str
    reward: float | None
    origin: Origin
    policy_version: str
    failed: tuple[int, ...] = ()
    scaffold: str = ""
    versions: tuple[str, ...] = ()


def leaf_counts(parents: Sequence[int]) -> list[int]:
    """How many leaves are at or below each token: `Sample.branches`. Parents come before their children."""
    counts = [0] * len(parents)
    for at in reversed(range(len(parents))):
        counts[at] = counts[at] or 1
        if parents[at] >= 0:
            counts[parents[at]] += counts[at]
    return counts
