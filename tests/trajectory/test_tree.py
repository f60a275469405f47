"""From calls to a tree of turns, and from that to one token tree that equals its branches."""

from typing import Any

import pytest
from hypothesis import given

from katcore.schema.call import ModelCall
from katcore.schema.rollout import Outcome, Rollout, Verdict
from katcore.trajectory.formats import TreeConfig, TreeFormatter, tree_sample
from katcore.trajectory.tree import build_trajectory
from tests.trajectory.made import call, rollout, sessions, whole_prompt


def test_one_turn_per_call_in_order() -> None:
    first = call(0, (1, 2), (3,))
    second = call(1, (4,), (5, 6), first)
    trajectory = build_trajectory("s", [first, second])
    assert [turn.parent for turn in trajectory.turns] == [-1, 0]
    assert [turn.prompt_ids for turn in trajectory.turns] == [(1, 2), (4,)]
    assert [turn.ids for turn in trajectory.turns] == [(3,), (5, 6)]
    assert trajectory.turns[1].logprobs == second.generation.logprobs
    assert trajectory.turns[1].messages == second.new_messages
    assert {turn.role for turn in trajectory.turns} == {"main"}


def test_an_empty_session_is_an_empty_trajectory() -> None:
    assert build_trajectory("s", []).turns == ()
    assert tree_sample(rollout([])) is None


def test_roles_come_from_structure() -> None:
    root = call(0, (1,), (2,))
    dropped = call(1, (3,), (4,), root)
    kept = call(2, (3,), (5,), root)
    title = call(3, (9, 9), (8,))
    last = call(4, (6,), (7,), kept)
    turns = build_trajectory("s", [root, dropped, kept, title, last]).turns
    roles = [turn.role for turn in turns]
    assert roles == ["main", "discarded", "main", "auxiliary", "main"]


def test_a_parent_that_was_not_recorded_is_a_root() -> None:
    orphan = call(1, (3,), (4,), call(0, (1,), (2,)))
    assert build_trajectory("s", [orphan]).turns[0].parent == -1


def test_a_fork_shares_its_prefix() -> None:
    root = call(0, (1,), (2,))
    left, right = call(1, (3,), (4,), root), call(2, (5,), (6,), root)
    sample = tree_sample(rollout([root, left, right]))
    assert sample
    assert sample.tokens == (1, 2, 3, 4, 5, 6)
    assert sample.parents == (-1, 0, 1, 2, 1, 4)
    assert sample.trained == (False, True, False, True, False, True)
    assert sample.branches == (2, 2, 1, 1, 1, 1)
    assert sample.logprobs[0] == sample.logprobs[2] == 0.0
    assert sample.logprobs[1] == root.generation.logprobs[0]
    assert (sample.rollout_id, sample.origin, sample.policy_version) == ("s", "sampled", "3")


def test_what_was_discarded_is_not_trained() -> None:
    root = call(0, (1,), (2,))
    dropped, kept = call(1, (3,), (4,), root), call(2, (3,), (5,), root)
    sample = tree_sample(rollout([root, dropped, kept]))
    assert sample
    assert sample.tokens == (1, 2, 3, 5)
    assert sample.branches == (1, 1, 1, 1)


def branch(sample: Any, leaf: int) -> tuple[list[int], list[bool], list[float]]:
    path = []
    at = leaf
    while at >= 0:
        path.append(at)
        at = sample.parents[at]
    path.reverse()
    return (
        [sample.tokens[at] for at in path],
        [sample.trained[at] for at in path],
        [sample.logprobs[at] for at in path],
    )


@given(sessions())
def test_every_answer_is_trained_once_after_the_very_prompt_it_was_sampled_from(
    calls: list[ModelCall],
) -> None:
    made = rollout(calls)
    sample = tree_sample(made)
    kept = [
        one
        for one, turn in zip(calls, made.trajectory.turns, strict=True)
        if turn.role != "discarded" and _is_reached(made, turn)
    ]
    num_trained = sum(len(one.generation.ids) for one in kept)
    if not sample:
        assert num_trained == 0
        return
    assert sum(sample.trained) == num_trained
    found = [branch(sample, at) for at in range(len(sample.tokens))]
    for one in kept:
        prompt, answer = whole_prompt(calls, one), one.generation
        if not answer.ids:
            continue
        whole = [*prompt, *answer.ids]
        same = [item for item in found if item[0] == whole]
        assert any(
            item[1][-len(answer.ids) :] == [True] * len(answer.ids)
            and item[2][-len(answer.ids) :] == list(answer.logprobs)
            for item in same
        )


def _is_reached(made: Rollout, turn: Any) -> bool:
    """Nothing that it continues was discarded."""
    while turn.parent >= 0:
        turn = made.trajectory.turns[turn.parent]
        if turn.role == "discarded":
            return False
    return True


@given(sessions())
def test_the_tree_is_in_depth_first_order_and_counts_its_branches(calls: list[ModelCall]) -> None:
    sample = tree_sample(rollout(calls))
    if not sample:
        return
    path: list[int] = []
    for at, parent in enumerate(sample.parents):
        assert -1 <= parent < at
        while path and path[-1] != parent:
            path.pop()
        assert parent == -1 or path
        path.append(at)
    inner = set(sample.parents)
    counts = [0] * len(sample.tokens)
    for leaf in range(len(sample.tokens)):
        if leaf not in inner:
            at = leaf
            while at >= 0:
                counts[at] += 1
                at = sample.parents[at]
    whole = [n for n, turn_branches in enumerate(sample.branches) if counts[n] != turn_branches]
    assert not whole


@given(sessions())
def test_the_path_to_the_last_call_is_main(calls: list[ModelCall]) -> None:
    turns = build_trajectory("s", calls).turns
    at = len(turns) - 1
    main = set()
    while at >= 0:
        main.add(at)
        at = turns[at].parent
    assert {n for n, turn in enumerate(turns) if turn.role == "main"} == main


@pytest.mark.parametrize("outcome", [item for item in Outcome if item is not Outcome.SCORED])
def test_only_scored_rollouts_become_samples(outcome: Outcome) -> None:
    calls = [call(0, (1,), (2,))]
    made = [
        rollout(calls, outcome=outcome, verdict=Verdict(1.0)),
        rollout(calls, verdict=Verdict(None)),
        rollout(calls, verdict=Verdict(0.0)),
    ]
    assert [sample.reward for sample in TreeFormatter(TreeConfig()).samples(made)] == [0.0]


def test_samples_that_are_too_long_are_left_out() -> None:
    short, long = call(0, (1,), (2,)), call(0, (1,) * 9, (2,))
    made = [rollout([long]), rollout([short])]
    samples = list(TreeFormatter(TreeConfig(max_tokens=4)).samples(made))
    assert [len(sample.tokens) for sample in samples] == [2]
