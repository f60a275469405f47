"""The load-balancing loss of mixtures of experts (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

Its statistics are over tokens. In a tree a token that g branches share is there once, so it counts g times:
the loss is that of the branches. Proven equal to transformers' own on the branches in
tests/train/test_balance.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def masses(router_logits: Sequence[Tensor], counts_P: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """How often each expert is chosen, and the sum of its probabilities, over all layers; (E,) each.

    `router_logits` has for each layer the logits of P places, of which `counts_P` says how often each counts.
    """
    chosen_E = mass_E = router_logits[0].new_zeros(router_logits[0].shape[-1])
    for logits_PE in router_logits:
        count_P1 = counts_P[:, None].to(logits_PE)
        probs_PE = logits_PE.softmax(-1)
        is_chosen_PE = torch.zeros_like(probs_PE).scatter(1, probs_PE.topk(top_k).indices, 1.0)
        chosen_E = chosen_E + (count_P1 * is_chosen_PE).sum(0)
        mass_E = mass_E + (count_P1 * probs_PE).sum(0)
    return chosen_E, mass_E


def balance_loss(chosen_E: Tensor, mass_E: Tensor) -> Tensor:
    """E * sum over experts of (share of the choices) * (mean probability)."""
    total = mass_E.detach().sum()
    return len(mass_E) * (chosen_E / total * (mass_E / total)).sum()
