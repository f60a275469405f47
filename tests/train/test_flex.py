"""Block masks made without a mask are those made from one."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from katcore.train import flex
from katcore.train.forest import subtree_sizes
from tests.train.test_partition import grown

BLOCKS = (
    ("kv_num_blocks", "kv_indices"),
    ("full_kv_num_blocks", "full_kv_indices"),
    ("q_num_blocks", "q_indices"),
    ("full_q_num_blocks", "full_q_indices"),
)


def ends(parents: list[int]) -> torch.Tensor:
    return torch.tensor([token + size for token, size in enumerate(subtree_sizes(parents))])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 700),
    st.sampled_from([0, 1, 128, 200]),
    st.sampled_from([0.003, 0.02, 0.2]),
    st.integers(0, 1000),
)
def test_blocks_are_those_of_the_dense_mask(
    num: int, num_past: int, forks: float, seed: int
) -> None:
    """Of trees that grow out of a path that is not there, too."""
    root = random.Random(seed).randint(0, num_past) - 1
    own = [num_past + at if at >= 0 else root for at in grown(num, forks, seed)]
    parents = [*range(-1, num_past - 1), *own]
    found = flex.block_mask(ends(parents), num)
    wanted = create_block_mask(found.mask_mod, None, None, num, len(parents), device="cpu")
    assert found.seq_lengths == wanted.seq_lengths
    for counts, indices in BLOCKS:
        listed = getattr(found, counts)
        assert torch.equal(listed, getattr(wanted, counts))
        for row, ours, theirs in zip(
            listed[0, 0], getattr(found, indices)[0, 0], getattr(wanted, indices)[0, 0], strict=True
        ):
            assert torch.equal(ours[:row], theirs[:row])


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made inside."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **kwargs or {})
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.num = max(self.num, one.numel())
        return made


@pytest.mark.parametrize("num_tokens", [1 << 14, 1 << 16])
def test_a_mask_of_many_tokens_takes_few_numbers(num_tokens: int) -> None:
    branch = grown(num_tokens // 16, 0.01, 0)
    parents = [
        at + start if at >= 0 else -1
        for start in range(0, num_tokens, len(branch))
        for at in branch
    ]
    with Largest() as largest:
        flex.block_mask(ends(parents), num_tokens)
    assert largest.num <= max(8 * num_tokens, 2 * (num_tokens // 128 + 1) ** 2)
