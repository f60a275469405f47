"""Random token trees and a small model in float64."""

import random
from typing import Any

import torch
from hypothesis import strategies as st

from katcore.config import ModelSettings
from katcore.schema.sample import Sample
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
    leaves = [0] * len(tokens)
    children = {parent for parent in parents if parent >= 0}
    for at in reversed(range(len(tokens))):
        if at not in children:
            leaves[at] = 1
        if parents[at] >= 0:
            leaves[parents[at]] += leaves[at]
    given = {
        "logprobs": (0.0,) * len(tokens),
        "rollout_id": "r",
        "task_id": "t",
        "domain": "d",
        "reward": None,
        "origin": "sampled",
        "policy_version": "0",
    } | facts
    return Sample(tuple(tokens), tuple(parents), tuple(trained), branches=tuple(leaves), **given)


def line(tokens: list[int], trained: list[bool], **facts: Any) -> Sample:
    return sample(tokens, list(range(-1, len(tokens) - 1)), trained, **facts)


@st.composite
def tree_samples(draw: Any) -> Sample:
    """Trees in depth-first order: a token's parent is on the path of the token before it."""
    choose = random.Random(draw(st.integers(0, 10**6)))
    num = choose.randint(2, 24)
    parents = [-1]
    for at in range(1, num):
        path = [at - 1]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        parents.append(at - 1 if choose.random() < 0.7 else choose.choice(path))
    tokens = [choose.randrange(VOCABULARY) for _ in range(num)]
    trained = [at > 0 and choose.random() < 0.6 for at in range(num)]
    return sample(tokens, parents, trained)


def branches(tree: Sample) -> list[tuple[list[int], list[bool]]]:
    """Every root-to-leaf path as a plain sequence."""
    inner = set(tree.parents)
    found = []
    for leaf in range(len(tree.tokens)):
        if leaf in inner:
            continue
        path = [leaf]
        while tree.parents[path[-1]] >= 0:
            path.append(tree.parents[path[-1]])
        path.reverse()
        found.append(([tree.tokens[at] for at in path], [tree.trained[at] for at in path]))
    return found


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
