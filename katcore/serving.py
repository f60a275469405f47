"""Settings of the engines that make the rollouts of training."""

from typing import Any, Literal

from pydantic import Field, model_validator

from katcore.settings import Settings


class ServeSettings(Settings):
    """The engines that make the rollouts of `rl`, `distill` and `evaluate`, and how they get new weights.

    `embedded` samples in the trainer's process; `vllm` starts `replicas` servers of `tensor_parallel` GPUs
    each, or uses as many at `urls`, which are as large. `devices` are the GPUs of all replicas in turn, as
    CUDA numbers them; without it, the first ones that are not the trainer's. `options` are further options of
    the engine `vllm`, such as `python`. An evaluation has servers for each of its models, and none shares.
    `placement: colocated` shares weights (embedded) or GPUs (vllm) with the trainer: the engine sleeps while
    the trainer steps. `disaggregated` has its own, and need not wait: with `staleness` the rollouts of a step
    may begin that many steps before it, and their tokens are of weights at most so much older.
    """

    engine: Literal["embedded", "vllm"] = "embedded"
    replicas: int = Field(default=1, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)
    placement: Literal["colocated", "disaggregated"] = "colocated"
    staleness: int = Field(default=0, ge=0)
    devices: tuple[int, ...] = ()
    urls: tuple[str, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_parts(self) -> "ServeSettings":
        if self.staleness and self.placement == "colocated":
            raise ValueError(
                "staleness is for engines that go on while the trainer steps: set placement: disaggregated"
            )
        if self.engine == "embedded":
            self._check_unset(
                "tensor_parallel", "devices", "urls", "options", where="with engine: embedded"
            )
        if self.urls:
            self._check_unset("devices", where="with urls")
            if len(self.urls) != self.replicas or self.placement == "colocated":
                raise ValueError(
                    f"{len(self.urls)} urls are as many replicas, on GPUs of their own: set"
                    f" replicas: {len(self.urls)} and placement: disaggregated"
                )
        num = self.replicas * self.tensor_parallel
        if self.devices and len(set(self.devices)) != num:
            raise ValueError(
                f"devices: {self.replicas} replicas of {self.tensor_parallel} GPUs need {num} different"
                f" ones, found {list(self.devices)}"
            )
        return self

    def devices_of(self, number: int, num_trained_on: int) -> tuple[int, ...]:
        """The GPUs of one replica, on a machine of which the trainer has so many, the first ones."""
        num = self.tensor_parallel
        first = 0 if self.placement == "colocated" else num_trained_on
        every = self.devices or tuple(range(first, first + self.replicas * num))
        return every[number * num : (number + 1) * num]

    def _check_unset(self, *names: str, where: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].get_default(
                call_default_factory=True
            ):
                raise ValueError(f"{name} means nothing {where}")
