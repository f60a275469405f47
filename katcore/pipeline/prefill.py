"""Several passes over finished rollouts, for log-probabilities that differ by noise alone.

Each pass asks for all rollouts in another order, and for another number of them at once, so that batches
differ in mates and padding.
"""

import asyncio
import random
from collections.abc import Sequence

from katcore.errors import ConfigError
from katcore.protocols import SupportsScore
from katcore.schema.call import Sampling, ScoreRequest
from katcore.schema.sample import Sample
from katcore.train.forest import branches
from katcore.train.mcla import Passes
from katcore.train.trainer import Trainer


def requests_of(sample: Sample, sampling: Sampling) -> list[tuple[ScoreRequest, list[int]]]:
    """What to ask an engine about a tree: each branch that has a trained token of its own.

    Beside each request are its tokens, numbered as trained tokens are; each is in one request.
    """
    numbers: dict[int, int] = {}
    for at, is_trained in enumerate(sample.trained):
        if is_trained:
            numbers[at] = len(numbers)
    asked: list[tuple[ScoreRequest, list[int]]] = []
    for path in branches(sample.parents):
        places = [place for place, at in enumerate(path) if at in numbers]
        if places:
            ids = tuple(sample.tokens[at] for at in path[: places[-1] + 1])
            own = [numbers.pop(path[place]) for place in places]
            asked.append((ScoreRequest(ids, tuple(places), sampling), own))
    return asked


async def engine_passes(
    engine: object,
    samples: Sequence[Sample],
    sampling: Sampling,
    num: int,
    *,
    at_once: int,
    order: random.Random,
) -> Passes:
    """The engine's log-probabilities of the trained tokens, `num` times.

    Raises:
        ConfigError: this engine cannot score.
    """
    if not isinstance(engine, SupportsScore):
        raise ConfigError(
            f"mcla: the engine {type(engine).__name__} cannot score ids that are there already; the embedded"
            " engine and vllm can. Take one of these, or average the trainer's: mcla.place: trainer"
        )
    asked = [(one, *pair) for one in samples for pair in requests_of(one, sampling)]
    passes = {one.rollout_id: [[0.0] * sum(one.trained) for _ in range(num)] for one in samples}
    most = max(1, min(at_once, len(asked)))
    for number in range(num):
        order.shuffle(asked)
        size = order.randint((most + 1) // 2, most)
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            found = await asyncio.gather(*(engine.score(request) for _, request, _ in part))
            for (one, _, own), values in zip(part, found, strict=True):
                for token, value in zip(own, values, strict=True):
                    passes[one.rollout_id][number][token] = value
    return passes


def trainer_passes(
    trainer: Trainer,
    samples: Sequence[Sample],
    temperature: float,
    num: int,
    *,
    order: random.Random,
) -> Passes:
    """The trainer's log-probabilities, `num` times; the first time as it would compute them once."""
    passes: dict[str, list[list[float]]] = {one.rollout_id: [] for one in samples}
    for number in range(num):
        cut = order.randint(0, len(samples)) if number else 0
        mixed = order.sample(samples, len(samples)) if number else list(samples)
        for part in (mixed[:cut], mixed[cut:]):
            for name, values in trainer.logprobs(part, temperature).items():
                passes[name].append(values)
    return passes
