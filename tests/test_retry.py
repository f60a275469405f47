"""What follows a failure: the same table for all, and delays that grow and differ."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katcore.errors import (
    EngineError,
    EvictedError,
    InfrastructureError,
    KatError,
    NoCapacityError,
    OutOfDiskError,
    OutOfMemoryError,
    RequestError,
    SandboxError,
    SandboxGoneError,
    TaskError,
)
from katcore.retry import Next, Rule, rule_for


def kinds(top: type[KatError]) -> set[type[KatError]]:
    return {top} | {kind for child in top.__subclasses__() for kind in kinds(child)}


@pytest.mark.parametrize("kind", sorted(kinds(InfrastructureError), key=lambda kind: kind.__name__))
def test_what_is_given_up_is_given_up_at_once(kind: type[KatError]) -> None:
    rule = rule_for(kind("x"))
    assert (rule.next is Next.NEVER) == (rule.times == 0)
    assert 0 < rule.first_s <= rule.most_s


@pytest.mark.parametrize(
    ("error", "following"),
    [
        (SandboxError("x"), Next.AGAIN),
        (SandboxGoneError("x"), Next.AGAIN),
        (OutOfMemoryError("x"), Next.AGAIN),
        (EvictedError("x"), Next.ELSEWHERE),
        (NoCapacityError("x"), Next.ELSEWHERE),
        (OutOfDiskError("x"), Next.ELSEWHERE),
        (EngineError("x"), Next.AGAIN),
        (TaskError("x"), Next.NEVER),
        (RuntimeError("a bug of ours"), Next.AGAIN),
        (RequestError("x"), Next.AGAIN),
    ],
)
def test_each_kind_has_its_rule(error: Exception, following: Next) -> None:
    assert rule_for(error).next is following


@given(
    first_s=st.floats(0.01, 10),
    more_s=st.floats(0, 100),
    tries=st.integers(1, 5000),
    seed=st.integers(),
)
def test_a_delay_is_in_the_upper_half_of_a_span_that_doubles(
    first_s: float, more_s: float, tries: int, seed: int
) -> None:
    rule = Rule(Next.AGAIN, first_s=first_s, most_s=first_s + more_s)
    span = min(first_s + more_s, first_s * 2 ** min(tries - 1, 1000))
    assert span / 2 <= rule.delay_s(tries, random.Random(seed)) <= span


def test_two_that_failed_together_do_not_come_back_together() -> None:
    rule = rule_for(NoCapacityError("x"))
    delays = {rule.delay_s(1, random.Random(seed)) for seed in range(100)}
    assert len(delays) == 100
