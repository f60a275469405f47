"""The processes that train one model together; alone, each function here does the least there is to do.

All of them run the same code on the same samples and differ in which trees they compute. So every one has to
come to each of these calls, in the same order.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from katcore.config import rank_of_process
from katcore.errors import ConfigError
from katcore.schema.sample import Sample
from katcore.train.forest import depths

_T = TypeVar("_T")
_WAIT = timedelta(days=2)
"""The others wait while one makes rollouts. That one of them died is seen by who started them."""
_BUCKET = 1 << 25
"""Numbers that are summed over the processes at once."""


def join() -> None:
    """Meet the other processes, if this one was started as one of several."""
    found = rank_of_process()
    if found is None or dist.is_initialized():
        return
    kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    options: dict[str, Any] = {}
    if found.meet_at:
        options = {"init_method": f"file://{found.meet_at}", "rank": found.rank}
        options["world_size"] = found.world
    dist.init_process_group(kind, timeout=_WAIT, **options)


def device(kind: str) -> torch.device:
    """What this process computes on: `cpu`, or, of a machine's GPUs (`cuda`), the one of its number.

    Raises:
        ConfigError: there is no GPU.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if not (num := torch.cuda.device_count()):
        raise ConfigError(
            f"scale.device: cuda, but torch {torch.__version__} sees no GPU here; set device: cpu, or see"
            " whether nvidia-smi lists one and torch is a build for CUDA"
        )
    found = rank_of_process()
    own = torch.device("cuda", (found.rank if found else 0) % num)
    torch.cuda.set_device(own)
    return own


def leave() -> None:
    """Part from the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until all are here."""
    if world() > 1:
        dist.barrier()


def make_room() -> None:
    """Give the GPU what torch keeps of it for later passes; returns when all have."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    wait()


@contextmanager
def in_turn(num: int) -> Iterator[None]:
    """Inside is one process of each machine at a time, of the `num` that it has."""
    join()
    own = rank() % num
    for _ in range(own):
        wait()
    yield
    for _ in range(own, num):
        wait()


def share(value: _T) -> _T:
    """What the first has."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: _T) -> list[_T]:
    """What each has."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def totals(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over all of them, by name."""
    found: dict[str, float] = {}
    for part in gathered(dict(values)):
        for name, value in part.items():
            found[name] = found.get(name, 0.0) + value
    return found


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Give each process the sum of all gradients; a parameter that has none counts as zeros."""
    if world() == 1 or not parameters:
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and sum(grad.numel() for grad in bucket) + parameter.numel() > _BUCKET:
            _sum(bucket)
            bucket = []
        bucket.append(parameter.grad)
    _sum(bucket)


def _sum(tensors: Sequence[Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    done = 0
    for tensor in tensors:
        tensor.copy_(flat[done : done + tensor.numel()].view_as(tensor))
        done += tensor.numel()


def spread(samples: Sequence[Sample], num: int, width: int) -> list[list[int]]:
    """The indices of the samples of each of `num` processes, so that all have about as much to compute.

    The dearest tree goes first, to who has least. A pair of tokens that attention looks at costs about
    1 / (6 `width`) of what a token does in layers of that width.
    """
    costs = [_cost(sample, width) for sample in samples]
    parts: list[list[int]] = [[] for _ in range(num)]
    sums = [0.0] * num
    for at in sorted(range(len(samples)), key=lambda at: -costs[at]):
        least = sums.index(min(sums))
        parts[least].append(at)
        sums[least] += costs[at]
    return [sorted(part) for part in parts]


def _cost(sample: Sample, width: int) -> float:
    return len(sample.tokens) + sum(depths(sample.parents)) / (6 * width)
