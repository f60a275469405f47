"""Trajectories as training samples: pure functions of the call log."""

from collections.abc import Container, Iterable, Iterator, Sequence

from pydantic import BaseModel, ConfigDict

from katcore.schema.call import Origin
from katcore.schema.rollout import Rollout, Turn, TurnRole
from katcore.schema.sample import Sample, leaf_counts
from katcore.trajectory.failed import has_failed

TRAINED: tuple[TurnRole, ...] = ("main", "subagent", "post-compaction")


class TreeConfig(BaseModel):
    """Options of the tree formatter: which roles are trained; how long a sample may be (0: any length).

    `failed` are beginnings of results, as `["error:"]`: an answer that one of them came back to has failed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: tuple[TurnRole, ...] = TRAINED
    max_tokens: int = 0
    failed: tuple[str, ...] = ()


class TreeFormatter:
    """One token tree per scored rollout; each sampled token once, context tokens never trained.

    Turns of other roles are left out, but for what others share of their prompts.
    """

    def __init__(self, config: TreeConfig) -> None:
        self._config = config

    def samples(self, rollouts: Iterable[Rollout]) -> Iterator[Sample]:
        """See `Formatter.samples`."""
        limit = self._config.max_tokens
        for rollout in rollouts:
            sample = None
            if rollout.reward is not None:
                sample = tree_sample(rollout, self._config.roles, self._config.failed)
            if sample and (not limit or len(sample.tokens) <= limit):
                yield sample


def tree_sample(
    rollout: Rollout, roles: Container[str] = TRAINED, failed: tuple[str, ...] = ()
) -> Sample | None:
    """The token tree of a rollout in depth-first order; None if it holds no turn that counts."""
    turns = rollout.trajectory.turns
    kept = [turn.role in roles for turn in turns]
    tree = _Tree(turns, kept)
    if not any(tree.trained):
        return None
    trained = [turn for turn, is_kept in zip(turns, kept, strict=True) if is_kept and turn.ids]
    return Sample(
        tuple(tree.tokens),
        tuple(tree.parents),
        tuple(tree.trained),
        tuple(tree.logprobs),
        tuple(leaf_counts(tree.parents)),
        rollout.id,
        rollout.task_id,
        rollout.domain,
        rollout.reward,
        _origin(trained),
        trained[-1].policy_version,
        tuple(
            number for number, turn in enumerate(tree.answers) if _has_failed(turns, turn, failed)
        ),
        rollout.scaffold,
        _versions([turns[number].policy_version for number in tree.answers]),
    )


class _Tree:
    """Tokens of turns in depth-first order: what forks off a turn comes after it, the latest fork first."""

    def __init__(self, turns: Sequence[Turn], kept: Sequence[bool]) -> None:
        self._turns = turns
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.trained: list[bool] = []
        self.logprobs: list[float] = []
        self.answers: list[int] = []
        """The turns that are trained, in the order of the tree."""
        self._first: dict[int, int] = {}
        extents = _extents(turns, kept)
        children: dict[int, list[int]] = {}
        for number, turn in enumerate(turns):
            if extents[number] > turn.num_shared:
                children.setdefault(self._holder(number), []).append(number)
        stack = list(reversed(children.get(-1, [])))
        while stack:
            number = stack.pop()
            self._add(number, extents[number], is_kept=kept[number])
            below = children.get(number, [])
            stack += sorted(below, key=lambda child: (turns[child].num_shared, -child))

    def _holder(self, number: int) -> int:
        """The turn whose own ids hold the last one that this turn shares; -1 if it shares none."""
        shared = self._turns[number].num_shared
        holder = self._turns[number].parent
        while holder >= 0 and shared <= self._turns[holder].num_shared:
            holder = self._turns[holder].parent
        return holder if shared else -1

    def _add(self, number: int, extent: int, *, is_kept: bool) -> None:
        turn = self._turns[number]
        holder = self._holder(number)
        last = -1
        if holder >= 0:
            last = self._first[holder] + turn.num_shared - self._turns[holder].num_shared - 1
        self._first[number] = len(self.tokens)
        room = extent - turn.num_shared
        num_prompt = len(turn.prompt_ids)
        own = (turn.prompt_ids + turn.ids)[:room]
        if is_kept and turn.ids:
            self.answers.append(number)
        for at, token in enumerate(own):
            is_answer = is_kept and at >= num_prompt
            self.parents.append(last)
            last = len(self.tokens)
            self.tokens.append(token)
            self.trained.append(is_answer)
            self.logprobs.append(turn.logprobs[at - num_prompt] if is_answer else 0.0)


def _extents(turns: Sequence[Turn], kept: Sequence[bool]) -> list[int]:
    """How many ids of each turn's conversation are in the tree: of one left out, what others share of it."""
    extents = [turn.num_ids if is_kept else 0 for turn, is_kept in zip(turns, kept, strict=True)]
    for number in reversed(range(len(turns))):
        turn = turns[number]
        if turn.parent >= 0 and extents[number]:
            shared = min(turn.num_shared, extents[number])
            extents[turn.parent] = max(extents[turn.parent], shared)
    return extents


def _has_failed(turns: Sequence[Turn], number: int, failed: tuple[str, ...]) -> bool:
    """Whether what came back to a turn's answer begins as a failure does."""
    if not failed:
        return False
    after = next((turn for turn in turns[number + 1 :] if turn.parent == number), None)
    if after is None:
        return False
    return has_failed(after.messages, failed, has_tool_calls=bool(turns[number].tool_calls))


def _versions(versions: list[str]) -> tuple[str, ...]:
    return tuple(versions) if len(set(versions)) > 1 else ()


def _origin(turns: Sequence[Turn]) -> Origin:
    origins = {turn.origin for turn in turns}
    return origins.pop() if len(origins) == 1 else "tokenised"
