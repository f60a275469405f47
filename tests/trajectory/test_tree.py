"""From calls to a tree of turns, and from that to one token tree that equals its branches."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from katcore.schema.call import Message
from katcore.schema.rollout import Outcome, Verdict
from katcore.train.batch import turns
from katcore.trajectory.formats import TreeConfig, TreeFormatter, tree_sample
from katcore.trajectory.tree import build_trajectory
from tests.proxy.fakes import text_of
from tests.trajectory.made import Recorder, call, rollout, sessions, whole_prompt

ROLES = {"main", "subagent", "post-compaction", "auxiliary"}


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


def test_a_parent_that_was_not_recorded_is_a_root() -> None:
    orphan = call(1, (3,), (4,), call(0, (1,), (2,)))
    trajectory = build_trajectory("s", [orphan])
    assert trajectory.turns[0].parent == -1
    assert trajectory.prompt(0) == orphan.new_messages


def test_a_fork_shares_its_prefix() -> None:
    root = call(0, (1,), (2,))
    left, right = call(1, (3,), (4,), root), call(2, (5,), (6,), root)
    last = call(3, (7,), (8,), left)
    sample = tree_sample(rollout([root, left, right, last]), ROLES)
    assert sample
    assert sample.tokens == (1, 2, 3, 4, 7, 8, 5, 6)
    assert sample.parents == (-1, 0, 1, 2, 3, 4, 1, 6)
    assert sample.trained == (False, True) * 4
    assert sample.branches == (2, 2, 1, 1, 1, 1, 1, 1)
    assert sample.logprobs[0] == sample.logprobs[2] == 0.0
    assert sample.logprobs[1] == root.generation.logprobs[0]
    assert (sample.rollout_id, sample.origin, sample.policy_version) == ("s", "sampled", "3")


def test_what_is_left_out_leaves_what_others_share_of_its_prompt() -> None:
    session = Recorder()
    session.say([user("a")], "x")
    session.say([user("a")], "y")
    session.say([user("a"), Message("assistant", "y"), user("b")], "z")
    dropped, *_ = build_trajectory("s", session.calls).turns
    assert dropped.role == "discarded"
    sample = tree_sample(rollout(session.calls))
    assert sample
    assert text_of(sample.tokens) == "U:a|A:y|U:b|A:z|"
    assert set(sample.branches) == {1}


def test_a_fork_in_the_middle_of_a_prompt_shares_what_came_before() -> None:
    session = Recorder()
    asked = [user("task"), user("remark")]
    session.say(asked, "x")
    session.say([user("task"), Message("assistant", "x"), user("out"), user("remark")], "y")
    sample = tree_sample(rollout(session.calls))
    assert sample
    assert text_of(sample.tokens) == "U:task|U:remark|A:x|A:x|U:out|U:remark|A:y|"
    answers = [at for at, is_trained in enumerate(sample.trained) if is_trained]
    assert text_of([sample.tokens[at] for at in answers]) == "x|y|"
    fork = sample.parents.index(5, 7)
    assert text_of(branch(sample, len(sample.tokens) - 1)[0]) == "U:task|A:x|U:out|U:remark|A:y|"
    assert sample.branches[5] == 2
    assert sample.branches[fork] == 1


def user(text: str) -> Message:
    return Message("user", text)


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
def test_the_log_gives_every_prompt_back(session: Recorder) -> None:
    assert [whole_prompt(session.calls, one) for one in session.calls] == session.prompts


@given(sessions())
def test_every_answer_is_trained_once_after_the_very_prompt_it_was_sampled_from(
    session: Recorder,
) -> None:
    made = rollout(session.calls)
    sample = tree_sample(made)
    roles = [turn.role for turn in made.trajectory.turns]
    kept = [number for number, role in enumerate(roles) if role in ROLES - {"auxiliary"}]
    answers = [session.calls[number].generation for number in kept]
    assert sample
    assert sum(sample.trained) == sum(len(answer.ids) for answer in answers)
    found = [branch(sample, at) for at in range(len(sample.tokens))]
    for number, answer in zip(kept, answers, strict=True):
        whole, num = [*session.prompts[number], *answer.ids], len(answer.ids)
        (at,) = (
            at
            for at, item in enumerate(found)
            if item[0] == whole and item[2][-num:] == list(answer.logprobs)
        )
        assert found[at][1][-num:] == [True] * num


@given(sessions())
def test_the_tree_is_in_depth_first_order_and_counts_its_branches(session: Recorder) -> None:
    sample = tree_sample(rollout(session.calls))
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


def test_answers_that_failed_are_numbered_in_the_order_of_the_tree() -> None:
    said = ["error: no x here", "fine", "error: tried", "error: too"]
    root = call(0, (1,), (2,))
    left, right = call(1, (3,), (4,), root), call(2, (5,), (6,), root)
    last = call(3, (7,), (8,), left)
    calls = [
        replace(one, new_messages=(Message("user", text),))
        for one, text in zip([root, left, right, last], said, strict=True)
    ]
    sample = tree_sample(rollout(calls), ROLES, ("error:",))
    assert sample
    assert sample.failed == (1,), "what came back to the root was fine, the first time"
    assert tree_sample(rollout(calls), ROLES) == replace(sample, failed=())


@given(sessions())
def test_answers_are_the_turns_of_training(session: Recorder) -> None:
    """Every answer is a run of trained tokens: that is how training numbers them."""
    calls = session.calls
    sample = tree_sample(rollout(calls), ROLES)
    answers = [one for one in rollout(calls).trajectory.turns if one.role in ROLES and one.ids]
    assert len(answers) == (1 + turns(sample)[-1] if sample else 0)
