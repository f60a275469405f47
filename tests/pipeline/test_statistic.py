"""Intervals against known values, and where a formula has nothing to say."""

import math

import pytest

from katcore.pipeline.statistic import paired_difference, paired_ratio, pass_rate


@pytest.mark.parametrize(
    ("num", "of", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (50, 100, 0.4038, 0.5962),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_s_interval(num: int, of: int, low: float, high: float) -> None:
    found = pass_rate([True] * num + [False] * (of - num))
    assert found.value == num / of
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_equal_results_differ_by_nothing() -> None:
    for values in ([1.0, 0.0, 1.0], [0.0] * 3, [1.0]):
        found = paired_difference(values, values)
        assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_a_difference_of_all_tasks_is_certain() -> None:
    found = paired_difference([1.0] * 20, [0.0] * 20)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_a_paired_difference_has_its_textbook_interval() -> None:
    new = [1.0] * 60 + [0.0] * 40
    old = [1.0] * 30 + [0.0] * 30 + [1.0] * 10 + [0.0] * 30
    found = paired_difference(new, old)
    assert found.value == pytest.approx(0.2)
    spread = 1.96 * math.sqrt((0.4 - 0.2**2) / 100)
    assert (found.low, found.high) == pytest.approx((0.2 - spread, 0.2 + spread), abs=0.02)


def test_the_same_data_give_the_same_interval() -> None:
    new, old = [1.0, 0.0, 1.0, 1.0] * 9, [0.0, 0.0, 1.0, 1.0] * 9
    assert paired_difference(new, old) == paired_difference(new, old)


def test_a_ratio_to_nothing_is_undefined() -> None:
    assert paired_ratio([1.0, 0.0], [0.0, 0.0]) is None


@pytest.mark.filterwarnings("error")
def test_a_ratio_to_almost_nothing_has_a_wide_interval() -> None:
    found = paired_ratio([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    assert found
    assert (found.value, found.low) == (2.0, 0.0)
    assert found.value <= found.high < math.inf


def test_equal_results_have_a_ratio_of_one() -> None:
    found = paired_ratio([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert found
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_a_ratio_of_rates() -> None:
    found = paired_ratio([1.0] * 45 + [0.0] * 55, [1.0] * 50 + [0.0] * 50)
    assert found
    assert found.value == pytest.approx(0.9)
    assert 0.8 < found.low < 0.9 < found.high < 1.0
