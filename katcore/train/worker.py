"""A thread that computes as the one that made it: as many threads wide, and on its GPU."""

from concurrent.futures import ThreadPoolExecutor

import torch


def new_worker() -> ThreadPoolExecutor:
    """One thread, for a trainer that steps while something else goes on."""
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
    return ThreadPoolExecutor(1, "trainer", _begin, (torch.get_num_threads(), gpu))


def _begin(num_threads: int, gpu: int | None) -> None:
    torch.set_num_threads(num_threads)
    if gpu is not None:  # torch's current one is a thread's own
        torch.cuda.set_device(gpu)
