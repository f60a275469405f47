"""Random token trees and a small model in float64."""

import random
from typing import Any

import torch
from hypothesis import strategies as st

from katcore.config import ModelSettings
from katcore.schema.sample import Sample, leaf_counts
from katcore.train.forest import branches
from katcore.train.policy import new_policy

VOCABULARY = 23


def small_model(seed: int = 0) -> Any:
    settings = ModelSettings(hidden=16, layers=2, heads=2, kv_heads=1, context=128)
    model = new_policy(settings, vocabulary=VOCABULARY, end_id=1, seed=seed)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":  # it computes in float32 whatever it is given
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], torch.nn.RMSNorm(16, eps=1e-6))
    return model.double().eval()


def sample(tokens: list[int], parents: list[int], trained: list[bool], **facts: Any) -> Sample:
    given = {
        "logprobs": (0.0,) * len(tokens),
        "branches": tuple(leaf_counts(parents)),
        "rollout_id": "r",
        "task_id": "t",
        "domain": "d",
        "reward": None,
        "origin": "sampled",
        "policy_version": "0",
    } | facts
    return Sample(tuple(tokens), tuple(parents), tuple(trained), **given)


def line(tokens: list[int], trained: list[bool], **facts: Any) -> Sample:
    return sample(tokens, list(range(-1, len(tokens) - 1)), trained, **facts)


@st.composite
def tree_samples(draw: Any) -> Sample:
    """Trees in depth-first order: a token's parent is on the path of the token before it.

    Some have several roots, as where sub-agents begin anew, and forks are anywhere, also inside answers.
    """
    choose = random.Random(draw(st.integers(0, 10**6)))
    num = choose.randint(2, 24)
    begins = choose.choice([0.0, 0.1])
    parents = [-1]
    for at in range(1, num):
        path = branches(parents)[-1]
        if choose.random() < 0.7:
            parents.append(at - 1)
        else:
            parents.append(-1 if choose.random() < begins else choose.choice(path))
    tokens = [choose.randrange(VOCABULARY) for _ in range(num)]
    trained = [parent >= 0 and choose.random() < 0.6 for parent in parents]
    return sample(tokens, parents, trained)


def alone(tree: Sample) -> list[Sample]:
    """Every branch as a plain sequence."""
    return [
        line(
            [tree.tokens[at] for at in path],
            [tree.trained[at] for at in path],
            logprobs=tuple(tree.logprobs[at] for at in path),
        )
        for path in branches(tree.parents)
    ]


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
