"""The state of what a training draws at random: in main memory, and on the device that it computes on."""

from collections.abc import Mapping

import torch
from torch import Tensor


def states(device: torch.device) -> dict[str, Tensor]:
    """By kind of device: dropout on a GPU draws there, all else on the CPU."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore(found: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on from `states`; those of a device that is not computed on any more are left out."""
    torch.set_rng_state(found["cpu"])
    if device.type == "cuda" and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"], device)
