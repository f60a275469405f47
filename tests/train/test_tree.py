"""A token tree in one pass is the sum of its branches, each run as a plain sequence."""

import torch
from hypothesis import given, settings

from katcore.schema.sample import Sample
from katcore.train.batch import collate, turns
from katcore.train.layout import ancestors
from katcore.train.objective import Sft
from katcore.train.policy import logits_at
from tests.train.test_attention import relative
from tests.train.trees import alone, gradients, sample, small_model, tree_samples

MODEL = small_model()


def loss_of(samples: list[Sample]) -> torch.Tensor:
    batch = collate(samples)
    logits = logits_at(MODEL, batch.ids_BT, batch.positions_BT, batch.mask_BTT, batch.at_N)
    return Sft()(logits, batch, samples)


@settings(max_examples=40, deadline=None)
@given(tree_samples())
def test_the_loss_of_a_tree_is_the_mean_over_its_branches(tree: Sample) -> None:
    if not any(tree.trained):
        return
    MODEL.zero_grad()
    whole = loss_of([tree])
    whole.backward()
    whole_gradient = gradients(MODEL)
    MODEL.zero_grad()
    paths = alone(tree)
    losses = [loss_of([path]) for path in paths if any(path.trained)]
    single = torch.stack(losses).sum() / len(paths)
    single.backward()
    assert relative(whole, single) < 1e-10
    assert relative(whole_gradient, gradients(MODEL)) < 1e-10


@settings(max_examples=20, deadline=None)
@given(tree_samples(), tree_samples())
def test_padding_changes_nothing(one: Sample, other: Sample) -> None:
    if not any(one.trained) or not any(other.trained):
        return
    together = loss_of([one, other])
    assert relative(together, loss_of([one]) + loss_of([other])) < 1e-10


def test_the_mask_is_the_ancestor_relation() -> None:
    mask = ancestors([-1, 0, 1, 1, 0])
    wanted = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4]]
    assert [row.nonzero()[:, 0].tolist() for row in mask] == wanted


def test_a_wrong_weight_is_noticed() -> None:
    """The equality above can fail: with g_t = 1 everywhere it does."""
    tree = sample([1, 2, 3, 4], [-1, 0, 1, 1], [False, True, True, True])
    wrong = Sample(**{**_fields(tree), "branches": (1, 1, 1, 1)})
    assert not torch.isclose(loss_of([tree]), loss_of([wrong]))


def _fields(row: Sample) -> dict[str, object]:
    return {name: getattr(row, name) for name in Sample.__slots__}


def test_a_turn_is_a_run_of_trained_tokens_on_one_path() -> None:
    #      0 -> 1T 2T -> 3 -> 4T       and 2T -> 5 -> 6T 7T
    parents = [-1, 0, 1, 2, 3, 2, 5, 6]
    trained = [False, True, True, False, True, False, True, True]
    assert turns(sample([1] * 8, parents, trained)) == [0, 0, 1, 2, 2]
