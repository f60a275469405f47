"""What a fresh policy is like."""

import torch

from katcore.config import ModelSettings
from katcore.train.policy import new_policy


def test_two_heads_start_by_attending_to_the_tokens_before() -> None:
    model = new_policy(ModelSettings(), vocabulary=300, end_id=1, seed=0)
    model.set_attn_implementation("eager")
    ids = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    weights = model(ids, output_attentions=True).attentions[0]
    for head, distance in enumerate((1, 2)):
        there = weights[:, head].diagonal(-distance, 1, 2)
        assert there.min() > 0.5, (head, there.min())


def test_a_seed_gives_the_same_weights_again() -> None:
    one, same, other = (
        new_policy(ModelSettings(), vocabulary=300, end_id=1, seed=seed) for seed in (3, 3, 4)
    )
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, same.state_dict()[name], rtol=0, atol=0)
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_embeddings_are_tied() -> None:
    model = new_policy(ModelSettings(), vocabulary=300, end_id=1, seed=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
