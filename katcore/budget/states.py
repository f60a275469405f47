"""Weights, gradients and optimizer of one process, alone or spread by DeepSpeed's ZeRO (arXiv 1910.02054).

With P parameters, T of them trained, N processes: up to stage 2 a process holds all weights in float32, 4 P
bytes, and with bfloat16 their copies for passes besides, 2 P; gradients of 4 T; and AdamW's moments, 8 T.
Stages 1 and 2 divide the moments by N, and the weights that they change and the sum of gradients, 4 T each; a
second set of whole gradients is there while they are handed over. Stage 3 is what DeepSpeed holds in bfloat16:
weights of 2 P and gradients of 2 T, float32 weights and moments of 12 T, all divided by N, and float32
gradients of what one update takes at a time; frozen models are divided, too.

tests/budget/test_states.py compares with what torch and DeepSpeed hold, and with DeepSpeed's estimators.
"""

from dataclasses import dataclass

from katcore.budget.shape import Shape
from katcore.settings import LoraSettings, ScaleSettings

_LIVE = 10**9
"""Parameters that stage 3 keeps whole, and updates at once (stage3_max_live_parameters, sub_group_size)."""
_BUCKET = 5 * 10**8
"""Elements that DeepSpeed reduces, or gathers, together (reduce_bucket_size, allgather_bucket_size)."""
_SUM = 1 << 25
"""Elements that are summed together without ZeRO (`katcore.train.ranks`)."""
_HOST = 1.5
"""Pinned memory comes in powers of two, and updates are copied: DeepSpeed's own factor."""


@dataclass(frozen=True, slots=True)
class States:
    """Bytes on one GPU, and on one machine's main memory (`host`) where states are offloaded.

    `copies` are weights in the precision of passes, `frozen` those of one model beside the trained one,
    `gathered` what stage 3 makes whole for a moment, `buckets` what is on its way between processes.
    """

    weights: int
    copies: int
    frozen: int
    gradients: int
    optimizer: int
    gathered: int = 0
    buckets: int = 0
    host: int = 0


def states(shape: Shape, scale: ScaleSettings, lora: LoraSettings | None = None) -> States:
    """Of a training of all weights, or of adapters."""
    adapters = shape.adapters(lora.rank, lora.targets) if lora else 0
    total = shape.num_parameters + adapters
    trained = adapters or total
    if scale.zero == 3:
        return _sharded(shape, scale, total, trained)
    copies = 2 * (total - shape.embedding * (not shape.is_tied)) if _is_narrow(scale) else 0
    frozen = 4 * shape.num_parameters
    if not scale.zero:
        buckets = 4 * min(trained, _SUM) if scale.world > 1 else 0
        return States(4 * total, copies, frozen, 4 * trained, 8 * trained, buckets=buckets)
    shard = trained / scale.world
    host, optimizer = 0.0, 12 * shard
    if scale.offload != "none":
        host = _HOST * trained * max(4 * scale.processes, 16 / scale.nodes)
        optimizer = 0
    return States(
        4 * total,
        copies,
        frozen,
        int(8 * trained + 4 * shard),
        int(optimizer),
        buckets=2 * 4 * min(trained, _BUCKET),
        host=int(host),
    )


def _sharded(shape: Shape, scale: ScaleSettings, total: int, trained: int) -> States:
    element, world = element_bytes(scale), scale.world
    wide = 4 if _is_narrow(scale) else 0
    shard = trained / world
    weights, gradients = element * total / world, element * shard + wide * min(shard, _LIVE)
    optimizer, host = (8 + wide) * shard, 0.0
    if scale.offload != "none":
        gradients = optimizer = 0
        host = 16 * trained / scale.nodes
    if scale.offload == "all":
        host += element * total / scale.nodes
        weights = 0
    return States(
        int(weights),
        0,
        int(element * shape.num_parameters / world),
        int(gradients),
        int(optimizer),
        element * min(total, max(_LIVE, 2 * shape.largest_layer)),
        2 * element * min(trained, _BUCKET),
        int(host * _HOST),
    )


def _is_narrow(scale: ScaleSettings) -> bool:
    return scale.precision == "bfloat16"


def element_bytes(scale: ScaleSettings) -> int:
    """Of one number in passes."""
    return 2 if _is_narrow(scale) else 4
