"""Memory of one GPU, part by part: while weights are updated, and while rollouts are made."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from katcore.budget.activation import Precision, activation_bytes, logit_bytes
from katcore.budget.card import GIB
from katcore.budget.shape import Shape
from katcore.budget.states import element_bytes, states
from katcore.errors import ConfigError
from katcore.serving import ServeSettings
from katcore.settings import LoraSettings, ScaleSettings

Parts = Mapping[str, int]
"""Bytes by what they are for."""
UTILIZATION = "--gpu-memory-utilization"
_DEFAULT_UTILIZATION = 0.9
_ENGINE_ROOM = 2 * GIB
"""Of a vLLM server besides weights and cache: a prefill's activations, CUDA graphs, buffers of NCCL."""
_ASLEEP = 2 * GIB
"""Of a vLLM server that sleeps: its context and its graphs."""
_CONTEXT = 1.5 * GIB
_SPARE = 0.03
"""A process's CUDA context and buffers, and the share of a card that fragmentation takes."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one stage asks of its GPUs.

    `held_tokens` are those of one pass, of which `context` may be one conversation's. `frozen` models lie
    beside the trained one. Without `serve` no rollouts are made. Where nothing `is_trained`, the engines have
    the model of a folder, one for itself.
    """

    shape: Shape
    scale: ScaleSettings
    lora: LoraSettings | None
    held_tokens: int
    context: int
    frozen: int = 0
    serve: ServeSettings | None = None
    conversations: int = 0
    is_trained: bool = True

    @property
    def is_shared(self) -> bool:
        """Whether a vLLM server has the trainer's GPUs."""
        serve = self.serve
        if serve is None or not self.is_trained:
            return False
        return serve.engine == "vllm" and serve.placement == "colocated"


def update_parts(need: Need) -> Parts:
    """While weights are updated; empty if none are."""
    if not need.is_trained:
        return {}
    found = states(need.shape, need.scale, need.lora)
    element = element_bytes(need.scale)
    activations = activation_bytes(
        need.shape,
        need.held_tokens,
        Precision(element, is_mixed=element < 4),
        is_recomputed=need.scale.recompute or need.scale.zero == 3,
        lora=need.lora,
    )
    return {
        "weights": found.weights,
        "weights in bfloat16": found.copies,
        "frozen models": need.frozen * found.frozen,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "gathered weights": found.gathered,
        "buckets": found.buckets,
        "activations": activations,
        "logits": logit_bytes(need.shape, need.held_tokens),
        "engine, asleep": _ASLEEP if need.is_shared else 0,
        **_in_process(need),
    }


def rollout_parts(need: Need) -> Parts:
    """While rollouts are made; empty if none are, or their GPUs are no business of ours.

    Of vLLM's cache it is what one conversation needs, without which a server does not start.
    """
    serve = need.serve
    if serve is None or serve.urls:
        return {}
    found = states(need.shape, need.scale, need.lora)
    trainer = {
        "weights": found.weights,
        "frozen models": need.frozen * found.frozen,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
    }
    if not need.is_trained:
        trainer = {}
    if serve.engine != "vllm":
        logits = {"logits": logit_bytes(need.shape, need.conversations)}
        return trainer | _in_process(need) | logits
    engine = {
        "engine: weights": 2 * need.shape.num_parameters // serve.tensor_parallel,
        "engine: cache": need.context * cache_bytes(need.shape, serve),
        "engine: room": _ENGINE_ROOM,
    }
    return trainer | engine if need.is_shared else engine


def _in_process(need: Need) -> dict[str, int]:
    """Of engines in the first process, all the time: weights, if not the trainer's own, and their cache."""
    serve = need.serve
    if serve is None or serve.engine != "embedded":
        return {}
    is_shared = need.is_trained and serve.placement == "colocated" and need.scale.zero < 3
    own = 0 if is_shared else 4 * need.shape.num_parameters
    cache = need.conversations * need.context * need.shape.kv_bytes(4)
    num = serve.replicas if need.is_trained else 1
    return {"engine: weights": own * num, "engine: cache": cache * num}


def cache_bytes(shape: Shape, serve: ServeSettings) -> int:
    """Of one token, on each GPU of a server: a key head is on several if they are more than heads."""
    return -(-shape.kv_bytes() // min(serve.tensor_parallel, shape.kv_heads))


def host_bytes(need: Need) -> int:
    """Of main memory on each machine, for what is offloaded.

    With stage 3 also for a whole model: one process at a time reads it, and the first one gathers it.
    """
    found = states(need.shape, need.scale, need.lora)
    whole = 4 * need.shape.num_parameters if need.scale.zero == 3 else 0
    return found.host + need.frozen * found.frozen_host + whole


def reserve(memory: int) -> int:
    """What a card of that much memory has not for us."""
    return int(_CONTEXT + _SPARE * memory)


def utilization(serve: ServeSettings) -> float:
    """The share of a card that a vLLM server takes when it starts, as its arguments say.

    Raises:
        ConfigError: they say no number above 0 and up to 1.
    """
    given = [str(one) for one in serve.options.get("arguments", ())]
    for at, one in enumerate(given):
        name, _, value = one.partition("=")
        if name.replace("_", "-") == UTILIZATION:
            said = value or "".join(given[at + 1 : at + 2])
            with suppress(ValueError):
                if 0 < (share := float(said)) <= 1:
                    return share
            raise ConfigError(
                f"serve.options.arguments: {UTILIZATION} {said!r} is no share of a card; say for example 0.9"
            )
    return _DEFAULT_UTILIZATION
