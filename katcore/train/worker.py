"""A thread that computes as many threads wide as the one that made it."""

from concurrent.futures import ThreadPoolExecutor

import torch


def new_worker() -> ThreadPoolExecutor:
    """One thread, for a trainer that steps while something else goes on."""
    return ThreadPoolExecutor(1, "trainer", torch.set_num_threads, (torch.get_num_threads(),))
