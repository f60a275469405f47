"""Trees that share a given part of their tokens, in two shapes.

POR, the potential overlap ratio of Tree Training, is 1 - (tokens of the tree) / (tokens of its branches).
"""

import math
import random
from collections.abc import Callable

from katcore.schema.sample import Sample, leaf_counts

Shape = Callable[[int, float], list[int]]
"""From how many tokens a tree has, and its POR: the parents of its tokens."""


def fork(num_tokens: int, por: float) -> list[int]:
    """One prompt and as many answers to it as it takes."""
    if not por:
        return apart(num_tokens)
    flat = num_tokens / (1 - por)
    num = math.ceil(2 / (1 - por))
    answer = max(1, round((num_tokens - flat / num) / (num - 1)))
    prompt = num_tokens - num * answer
    parents = list(range(-1, prompt - 1))
    for _ in range(num):
        parents += [prompt - 1, *range(len(parents), len(parents) + answer - 1)]
    return parents


def turns(num_tokens: int, por: float) -> list[int]:
    """An agent whose reasoning is dropped: the next turn goes on from before it."""
    if not por:
        return apart(num_tokens)
    flat = num_tokens / (1 - por)
    num = max(2, math.ceil(1 + 3 * (flat / num_tokens - 1)))
    kept = max(1, round(2 * (flat - num_tokens) / (num * (num - 1))))
    dropped = max(1, num_tokens // num - kept)
    parents: list[int] = []
    last = -1
    for _ in range(num):
        for length in (kept, dropped):
            parents += [last, *range(len(parents), len(parents) + length - 1)]
            last = len(parents) - 1
        last -= dropped
    return parents


def apart(num_tokens: int) -> list[int]:
    """Four sequences that share nothing."""
    length = num_tokens // 4
    return [-1 if at == 0 else row * length + at - 1 for row in range(4) for at in range(length)]


SHAPES: dict[str, Shape] = {"fork": fork, "turns": turns}


def tree(
    parents: list[int], vocabulary: int, seed: int, trained: list[bool] | None = None
) -> Sample:
    """A sample with those parents and drawn ids; if not said otherwise, every other run of 16 is trained."""
    if trained is None:
        trained = [above >= 0 and token % 32 >= 16 for token, above in enumerate(parents)]
    choose = random.Random(seed)
    num = len(parents)
    return Sample(
        tuple(choose.randrange(vocabulary) for _ in range(num)),
        tuple(parents),
        tuple(trained),
        (0.0,) * num,
        tuple(leaf_counts(parents)),
        f"tree-{seed}",
        "",
        "",
        None,
        "sampled",
        "",
    )
