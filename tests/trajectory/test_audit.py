"""The audit fails on any alteration of what was recorded."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from katcore.schema.call import ModelCall
from katcore.schema.sample import Sample
from katcore.trajectory.audit import audit_samples
from katcore.trajectory.formats import tree_sample
from tests.trajectory.made import Recorder, call, rollout, sessions

VERSIONS = st.sampled_from(["3", "4"])


def linear() -> tuple[list[ModelCall], Sample]:
    first = call(0, (1, 2), (3, 4))
    calls = [first, call(1, (5,), (6, 7), first)]
    sample = tree_sample(rollout(calls))
    assert sample
    return calls, sample


def problems(sample: Sample, calls: list[ModelCall]) -> tuple[str, ...]:
    return audit_samples([sample], {"s": calls}).problems


def changed(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


@given(sessions())
def test_what_the_log_gives_passes(session: Recorder) -> None:
    calls = session.calls
    sample = tree_sample(rollout(calls))
    assume(sample)
    assert sample
    audit = audit_samples([sample], {"s": calls})
    assert not audit.problems
    assert audit.num_samples == 1
    assert audit.num_trained_tokens == sum(sample.trained)


@given(sessions(), st.data())
def test_each_answer_has_the_version_that_gave_it(session: Recorder, data: st.DataObject) -> None:
    calls = [
        replace(one, generation=replace(one.generation, policy_version=data.draw(VERSIONS)))
        for one in session.calls
    ]
    sample = tree_sample(rollout(calls))
    assume(sample)
    assert sample
    assert not problems(sample, calls)
    if sample.versions:
        at = data.draw(st.integers(0, len(sample.versions) - 1))
        altered = replace(sample, versions=changed(sample.versions, at, "9"))
        assert problems(altered, calls)


@given(sessions(), st.data())
def test_any_altered_token_is_found(session: Recorder, data: st.DataObject) -> None:
    calls = session.calls
    sample = tree_sample(rollout(calls))
    assume(sample)
    assert sample
    children = set(sample.parents)
    matters = [
        at
        for at in range(len(sample.tokens))
        if sample.trained[at] or _leads_to_trained(sample, at)
    ]
    assert children
    at = data.draw(st.sampled_from(matters))
    altered = replace(sample, tokens=changed(sample.tokens, at, 99))
    assert problems(altered, calls)


def _leads_to_trained(sample: Sample, at: int) -> bool:
    for token, is_trained in enumerate(sample.trained):
        above = token
        while is_trained and above >= 0:
            if above == at:
                return True
            above = sample.parents[above]
    return False


@given(sessions(), st.data())
def test_any_altered_logprob_is_found(session: Recorder, data: st.DataObject) -> None:
    calls = session.calls
    sample = tree_sample(rollout(calls))
    assume(sample)
    assert sample
    at = data.draw(st.sampled_from([n for n, it in enumerate(sample.trained) if it]))
    altered = replace(sample, logprobs=changed(sample.logprobs, at, sample.logprobs[at] - 1e-12))
    assume(altered != sample)
    assert problems(altered, calls)


@pytest.mark.parametrize("at", range(7))
def test_any_flipped_mark_is_found(at: int) -> None:
    calls, sample = linear()
    flipped = replace(sample, trained=changed(sample.trained, at, not sample.trained[at]))
    assert problems(flipped, calls)


def test_an_answer_trained_twice_is_found() -> None:
    calls, sample = linear()
    num = len(sample.tokens)
    twice = replace(
        sample,
        tokens=sample.tokens * 2,
        parents=(*sample.parents, -1, *(at + num for at in range(num - 1))),
        trained=sample.trained * 2,
        logprobs=sample.logprobs * 2,
        branches=sample.branches * 2,
    )
    assert problems(twice, calls)
    assert audit_samples([sample, sample], {"s": calls}).problems


def test_another_rollout_s_answer_is_found() -> None:
    calls, sample = linear()
    assert audit_samples([sample], {"other": calls}).problems
    assert audit_samples([sample], {}).problems


def test_another_policy_s_answer_is_found() -> None:
    calls, sample = linear()
    assert problems(replace(sample, policy_version="4"), calls)


def test_an_answer_after_another_prompt_is_found() -> None:
    calls, sample = linear()
    moved = replace(sample, parents=(-1, 0, 1, 2, 1, 4, 5))
    assert problems(moved, calls)


def test_at_most_a_hundred_problems_are_listed() -> None:
    _, sample = linear()
    audit = audit_samples([sample] * 80, {})
    assert len(audit.problems) == 100
    assert audit.num_samples == 80
