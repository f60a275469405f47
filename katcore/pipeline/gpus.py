"""A run's GPUs and servers are had by one of its stages at a time: each takes all that the preset names."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from katcore.config import Preset, home, rank_of_process
from katcore.pipeline.commands import SAMPLES, TRAINS


def has_gpus(preset: Preset, stage: str) -> bool:
    """Whether a stage computes on GPUs, its own or those of servers, which have one model at a time."""
    if stage in SAMPLES and preset.serve.engine == "vllm":
        return True
    return preset.scale.device == "cuda" and stage in {*TRAINS, *SAMPLES}


@contextmanager
def alone(preset: Preset, stage: str, say: Callable[[str], None]) -> Iterator[None]:
    """While a stage has the GPUs, if it needs any; waits for the one that has them.

    Of several processes that train together, the one that started them has the GPUs for all; the first of
    them, if torchrun did.
    """
    found = rank_of_process()
    is_had = found is not None and (found.rank > 0 or found.meet_at)
    if is_had or not has_gpus(preset, stage):
        yield
        return
    home().mkdir(parents=True, exist_ok=True)
    with (home() / "gpus.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{stage} waits for the stage that has the GPUs")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
