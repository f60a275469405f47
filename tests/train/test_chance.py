"""What is drawn after a checkpoint is drawn again after it was read: on the CPU, and on a GPU."""

import pytest
import torch

from katcore.train import chance


class Gpus:
    """The generators of two GPUs, of which the second is computed on."""

    def __init__(self) -> None:
        self.each = [torch.Generator().manual_seed(number) for number in range(2)]

    def get(self, device: torch.device) -> torch.Tensor:
        return self.each[device.index].get_state()

    def set(self, state: torch.Tensor, device: torch.device) -> None:
        self.each[device.index].set_state(state)


def test_a_device_goes_on_as_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, device = Gpus(), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", gpus.get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", gpus.set)

    def drawn() -> list[float]:
        return [float(torch.rand(1, generator=one)) for one in (None, gpus.each[1])]

    kept = chance.states(device)
    wanted, other = drawn(), float(torch.rand(1, generator=gpus.each[0]))
    assert drawn() != wanted
    chance.restore(kept, device)
    assert drawn() == wanted
    assert float(torch.rand(1, generator=gpus.each[0])) != other, "no other GPU is touched"


@pytest.mark.parametrize(("before", "now"), [("cpu", "cpu"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_another_device_keeps_its_own(
    before: str, now: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: torch.zeros(1))
    monkeypatch.delattr(torch.cuda, "set_rng_state")
    kept = chance.states(torch.device(before))
    wanted = torch.rand(3)
    chance.restore(kept, torch.device(now))
    assert torch.equal(torch.rand(3), wanted)
