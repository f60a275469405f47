"""Token rows hold every branch of the tree, and train every sampled token once."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from pydantic import ValidationError

from katcore.schema.rollout import Outcome
from katcore.trajectory.formats import TRAINED
from katcore.trajectory.rows import RowsConfig, RowsFormatter
from tests.trajectory.made import Recorder, call, rollout, sessions


def rows(made: Any, **options: Any) -> list[dict[str, Any]]:
    return list(RowsFormatter(RowsConfig(**options)).samples([made]))


@given(sessions())
def test_every_sampled_token_is_trained_in_exactly_one_row_after_its_very_prompt(
    session: Recorder,
) -> None:
    made = rollout(session.calls)
    trained: list[tuple[tuple[int, ...], int, float]] = []
    for row in rows(made):
        ids = row["prompt_token_ids"] + row["completion_token_ids"]
        start = len(row["prompt_token_ids"])
        for at, (logprob, mark) in enumerate(zip(row["logprobs"], row["loss_mask"], strict=True)):
            if mark:
                trained.append((tuple(ids[: start + at]), ids[start + at], logprob))
    wanted: list[tuple[tuple[int, ...], int, float]] = []
    for prompt, one, turn in zip(
        session.prompts, session.calls, made.trajectory.turns, strict=True
    ):
        if turn.role in TRAINED:
            answer = one.generation.ids
            for at, logprob in enumerate(one.generation.logprobs):
                wanted.append(((*prompt, *answer[:at]), answer[at], logprob))
    assert Counter(trained) == Counter(wanted)


@given(sessions())
def test_a_row_begins_with_a_sampled_token_and_its_lists_fit(session: Recorder) -> None:
    found = rows(rollout(session.calls))
    assert [row["branch"] for row in found] == list(range(len(found)))
    for row in found:
        num = len(row["completion_token_ids"])
        assert num == len(row["logprobs"]) == len(row["loss_mask"])
        assert any(row["loss_mask"])
        assert row["logprobs"][0] != 0


def test_a_fork_gives_two_rows_and_the_second_trains_nothing_twice() -> None:
    root = call(0, (1,), (2,))
    made = rollout([root, call(1, (3,), (4,), root), call(2, (5,), (6, 7), root)])
    first, second = rows(made, roles=("main", "auxiliary"))
    assert (first["prompt_token_ids"], first["completion_token_ids"]) == ([1], [2, 3, 4])
    assert first["loss_mask"] == [1, 0, 1]
    assert second["completion_token_ids"] == [2, 5, 6, 7]
    assert second["loss_mask"] == [0, 0, 1, 1]
    assert second["logprobs"] == [
        *root.generation.logprobs,
        0.0,
        *made.trajectory.turns[2].logprobs,
    ]
    facts = {"rollout_id": "s", "group": "g", "domain": "d", "reward": 1.0, "policy_version": "3"}
    assert facts.items() <= second.items()


def test_what_a_row_that_is_too_long_would_have_trained_is_trained_in_another() -> None:
    root = call(0, (1,), (2,))
    made = rollout([root, call(1, (3,) * 9, (4,), root), call(2, (5,), (6,), root)])
    (row,) = rows(made, roles=("main", "auxiliary"), max_tokens=4)
    assert row["loss_mask"] == [1, 0, 1]


def test_rollouts_that_were_not_scored_have_no_rows() -> None:
    assert not rows(rollout([call(0, (1,), (2,))], outcome=Outcome.CANCELLED))


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValidationError):
        RowsConfig.model_validate({"role": "main"})
