"""Many parts below one: their gradients are added up as exactly as in one pass, also in bfloat16."""

import torch

from katcore.train import relay
from katcore.train.engine import Engine
from katcore.train.objective import Sft
from katcore.train.precision import compute_in_bfloat16
from tests.train.architectures import tiny
from tests.train.test_attention import relative
from tests.train.trees import sample

NUM = 600


def test_gradients_of_many_children_do_not_vanish_in_the_sum() -> None:
    """In bfloat16 256 + 1 is 256."""
    chain = relay._Chain()
    key, value = torch.zeros(2, 1, 1, 3, 2, dtype=torch.bfloat16).requires_grad_().unbind()
    chain.keep(0, (key, value))
    for _ in range(NUM):
        leaves = chain.leaves(0, 2)
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        chain.relay(0, leaves)
    tensors, grads = chain.ends
    assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in tensors]
    for grad in grads:
        assert grad[0, 0, :, 0].tolist() == [NUM, NUM, 0]


def test_in_bfloat16_a_tree_of_many_parts_is_as_near_as_the_whole_tree() -> None:
    """All children are alike, so that their gradients add up."""
    tree = sample(
        [1, 2, *[5, 9] * NUM],
        [-1, 0, *(at for child in range(NUM) for at in (1, 2 + 2 * child))],
        [False, False, *[True] * 2 * NUM],
    )
    model = tiny("llama").float()
    engine = Engine(model)

    def learnt(max_tokens: int = 0) -> torch.Tensor:
        """Of the first token, which is only context: all of its gradient comes from the children."""
        model.zero_grad()
        if max_tokens:
            engine.backward_in_parts(tree, Sft(), float(NUM), max_tokens)
        else:
            engine.backward([tree], Sft(), float(NUM))
        grad: torch.Tensor = model.get_input_embeddings().weight.grad[1].clone()
        return grad

    wanted = learnt()
    compute_in_bfloat16(model)
    whole, parts = relative(learnt(), wanted), relative(learnt(2), wanted)
    assert whole < 0.05
    assert parts < 0.05
