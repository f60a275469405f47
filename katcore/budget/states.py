"""Weights, gradients and optimizer of one process, alone or spread by DeepSpeed's ZeRO (arXiv 1910.02054).

With P parameters, T of them trained, N processes: up to stage 2 a process holds all weights in float32, 4 P
bytes, and with bfloat16 copies of what layers multiply with besides, at most 2 P; gradients of 4 T; and
AdamW's moments, 8 T. Stages 1 and 2 divide the moments by N, and the weights that they change and the sum
of gradients, 4 T each; a second set of whole gradients is there while they are handed over. Stage 3 divides
all by N but what is no layer, and has one layer whole at a time; of frozen models, too. These have in
bfloat16 what they multiply with, but for the output projection. Offloaded, its optimizer has weights and
gradients of its own in main memory, 16 T / N with the moments; with `offload: all` they are the only ones.

tests/budget/test_states.py compares with what torch holds, and with DeepSpeed's estimators.
"""

from dataclasses import dataclass

from katcore.budget.shape import Shape
from katcore.settings import LoraSettings, ScaleSettings

_BUCKET = 5 * 10**8
"""Elements that DeepSpeed reduces, or gathers, together (reduce_bucket_size, allgather_bucket_size)."""
_SUM = 1 << 25
"""Elements that are summed together without DeepSpeed."""
_HOST = 1.5
"""Pinned memory comes in powers of two, and updates are copied: DeepSpeed's own factor."""


@dataclass(frozen=True, slots=True)
class States:
    """Bytes on one GPU, and on one machine's main memory (`host`) where states are offloaded.

    `copies` are weights in the precision of passes, `frozen` those of one model beside the trained one, of
    which a machine has `frozen_host` in main memory; `gathered` is what stage 3 makes whole for a moment,
    `buckets` what is on its way between processes.
    """

    weights: int
    copies: int
    frozen: int
    gradients: int
    optimizer: int
    gathered: int = 0
    buckets: int = 0
    host: int = 0
    frozen_host: int = 0


def states(shape: Shape, scale: ScaleSettings, lora: LoraSettings | None = None) -> States:
    """Of a training of all weights, or of adapters."""
    adapters = shape.adapters(lora.rank, lora.targets) if lora else 0
    total = shape.num_parameters + adapters
    trained = adapters or total
    if scale.zero == 3:
        return _layerwise(shape, scale, adapters)
    copies = 2 * (shape.products + shape.routers + adapters) if _is_narrow(scale) else 0
    frozen = 4 * shape.num_parameters - _narrowed(shape, scale)
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


def _layerwise(shape: Shape, scale: ScaleSettings, adapters: int) -> States:
    """Stage 3. Gradients of a layer are whole twice: as they are added up, and the one that is added."""
    inner, ends, layer = shape.num_parameters - shape.ends, shape.ends, shape.largest_layer
    shards, learnt = (inner + adapters) / scale.world, (adapters or inner) / scale.world
    whole = 0 if adapters else ends
    is_here = scale.offload != "all"
    each = 4 + 2 * _is_narrow(scale) + (0 if adapters else 8)
    frozen = 4 * inner - _narrowed(shape, scale)
    host = {
        "none": 0.0,
        "optimizer": 16 * (learnt + whole),
        "all": 4 * shards + 12 * learnt + 16 * whole,
    }[scale.offload]
    return States(
        weights=int(4 * (shards * is_here + ends)),
        copies=0,
        frozen=int(frozen / scale.world * is_here + 4 * ends),
        gradients=int(4 * (learnt * is_here + whole)),
        optimizer=int(8 * (learnt + whole)) if scale.offload == "none" else 0,
        gathered=each * layer,
        buckets=0 if adapters or scale.world == 1 else 4 * min(ends, _SUM),
        host=int(host * scale.processes),
        frozen_host=0 if is_here else int(frozen / scale.nodes),
    )


def _narrowed(shape: Shape, scale: ScaleSettings) -> int:
    """Bytes that a frozen model is smaller than in float32."""
    return 2 * shape.products * _is_narrow(scale)


def _is_narrow(scale: ScaleSettings) -> bool:
    return scale.precision == "bfloat16"


def element_bytes(scale: ScaleSettings) -> int:
    """Of one number in passes."""
    return 2 if _is_narrow(scale) else 4
