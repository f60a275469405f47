"""Passes over finished rollouts: the right tokens at the right places, in batches that differ."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from katcore.errors import ConfigError
from katcore.inference.embedded import open_engine
from katcore.pipeline.prefill import engine_passes, requests_of, trainer_passes
from katcore.schema.call import Sampling, ScoreRequest
from katcore.schema.sample import Sample
from katcore.train.policy import load_policy
from katcore.train.trainer import Schedule, Trainer
from tests.inference.tiny import CONTEXT, write_tiny_model
from tests.train.trees import line, sample

#             0 -> 1T -> 2T -> 3 -> 4T, and 2T -> 5 -> 6T
TREE = sample(
    [9, 8, 7, 6, 5, 16, 15],
    [-1, 0, 1, 2, 3, 2, 5],
    [False, True, True, False, True, False, True],
)
HOT = Sampling(0.7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def lines(num: int) -> list[Sample]:
    choose = random.Random(3)
    return [
        line(
            choose.choices(range(5, 260), k=length),
            [at > 3 and at % 5 != 0 for at in range(length)],
            rollout_id=f"r{number}",
        )
        for number, length in enumerate(choose.choices(range(6, 40), k=num))
    ]


def test_a_token_is_asked_for_once_on_a_path_it_is_on() -> None:
    (first, own), (second, other) = requests_of(TREE, HOT)
    assert first == ScoreRequest((9, 8, 7, 6, 5), (1, 2, 4), HOT)
    assert second == ScoreRequest((9, 8, 7, 16, 15), (4,), HOT)
    assert (own, other) == ([0, 1, 2], [3])
    assert requests_of(line([1, 2, 3], [False, True, False]), HOT)[0][0].ids == (1, 2)


class Echo:
    """An engine whose log-probability of an id is known; keeps what was asked at once."""

    def __init__(self) -> None:
        self.batches: list[list[ScoreRequest]] = []
        self._num = 0

    async def score(self, request: ScoreRequest) -> tuple[float, ...]:
        if not self._num:
            self.batches.append([])
        self._num += 1
        self.batches[-1].append(request)
        await asyncio.sleep(0)
        self._num -= 1
        return tuple(-float(request.ids[place]) for place in request.places)


async def test_each_pass_has_other_batches_and_the_same_tokens() -> None:
    engine, samples = Echo(), [*lines(30), TREE]
    passes = await engine_passes(engine, samples, HOT, 4, at_once=8, order=random.Random(0))
    for one in samples:
        wanted = [-float(t) for t, yes in zip(one.tokens, one.trained, strict=True) if yes]
        assert passes[one.rollout_id] == [wanted] * 4
    assert len({tuple(batch) for batch in engine.batches}) == len(engine.batches)
    assert len({len(batch) for batch in engine.batches}) > 2
    assert max(map(len, engine.batches)) <= 8
    again = Echo()
    await engine_passes(again, samples, HOT, 4, at_once=8, order=random.Random(0))
    assert again.batches == engine.batches


async def test_engine_and_trainer_say_the_same_of_a_tree(folder: Path) -> None:
    samples = [*lines(9), TREE]
    engine = open_engine(folder, num_slots=4, context=CONTEXT)
    trainer = Trainer(load_policy(folder), Schedule(1e-3, 1), max_tokens=200)
    found = await engine_passes(engine, samples, HOT, 3, at_once=5, order=random.Random(1))
    wanted = trainer.logprobs(samples, 0.7)
    for name, rows in found.items():
        for row in rows:
            assert row == pytest.approx(wanted[name], abs=2e-5)
    own = trainer_passes(trainer, samples, 0.7, 3, order=random.Random(1))
    for name, rows in own.items():
        assert rows[0] == wanted[name]
        for row in rows:
            assert row == pytest.approx(wanted[name], abs=2e-5)


async def test_an_engine_that_cannot_score_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"object cannot score.*mcla.place: trainer"):
        await engine_passes(object(), [TREE], HOT, 2, at_once=4, order=random.Random(0))


def test_nothing_is_asked_about_what_was_not_sampled() -> None:
    assert requests_of(replace(TREE, trained=(False,) * 7), HOT) == []
