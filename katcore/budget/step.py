"""Tokens of a step, and the seconds that its arithmetic takes at the least."""

from dataclasses import dataclass

from katcore.budget.card import Card
from katcore.budget.memory import Need
from katcore.budget.shape import Shape


@dataclass(frozen=True, slots=True)
class Step:
    """At most so many tokens, learnt from in `passes`; in `looks` they only go forwards."""

    tokens: int
    passes: int = 1
    looks: int = 0


def forward_flops(shape: Shape, context: int) -> float:
    """Of one token: its products with weights, and of attention with the half of a conversation before it.

    Looking up an embedding costs none; a tied one is counted once, for the projection.
    """
    weights = shape.num_active - (0 if shape.is_tied else shape.embedding)
    return 2.0 * weights + 4.0 * shape.layers * shape.query_width * context / 2


def seconds(need: Need, step: Step, card: Card) -> float:
    """The bound of a step's updates: its flops at the card's peak, on all GPUs. 0 if that is not known.

    Backwards costs twice the forward pass, with adapters once (frozen weights have no gradient), and a
    forward pass more where activations are computed again, as stage 3 does anyway. Rollouts are not in it.
    """
    if not card.flops:
        return 0.0
    forward = forward_flops(need.shape, need.context)
    passes = (2.0 if need.lora else 3.0) + (need.scale.recompute or need.scale.zero == 3)
    flops = step.tokens * forward * (passes * step.passes + step.looks)
    return flops / (card.flops * need.scale.world)
