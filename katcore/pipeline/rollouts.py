"""What the stages that make rollouts share: proxy, sandboxes, the experts' parts, and durable results."""

import statistics
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katcore.errors import StageError
from katcore.pipeline.stage import Job
from katcore.protocols import Formatter, SandboxBackend
from katcore.proxy.server import Proxy
from katcore.rollout.collect import Limits, collect
from katcore.rollout.places import Places
from katcore.rollout.single import Attempt, Parts
from katcore.sandbox.lease import open_backend
from katcore.schema.call import Sampling
from katcore.schema.codec import read_lines, to_json
from katcore.schema.event import RolloutFinished
from katcore.schema.expert import Expert
from katcore.schema.rollout import Outcome, Rollout
from katcore.schema.sample import Sample
from katcore.schema.task import Task
from katcore.trajectory.calls import drop_torn_line

_MAX_LOST = 0.1


@dataclass(frozen=True, slots=True)
class Rollouts:
    """An open proxy and sandbox backend, and the job they serve."""

    job: Job
    proxy: Proxy
    backend: SandboxBackend
    places: Places | None = None

    def parts(self, expert: Expert, sampling: Sampling) -> Parts:
        """The parts of one expert's rollouts."""
        make = self.job.plugins.make
        scaffold = make("scaffold", expert.scaffold, expert.scaffold_options)
        verifier = make("verifier", expert.verifier, expert.verifier_options)
        return Parts(
            self.proxy, self.backend, scaffold, verifier, sampling, scaffold_name=expert.scaffold
        )

    async def run(
        self, attempts: Iterable[Attempt], parts: Parts, rank: int = 0
    ) -> AsyncIterator[Rollout]:
        """Every attempt's rollout as it ends; observers are told of each.

        Those of a lower rank, if some are made at the same time, come first.

        Raises:
            StageError: after the last, if more than a tenth was lost to infrastructure.
        """
        limits = Limits(self.job.preset.concurrency, self.places, rank)
        num = 0
        lost: list[Rollout] = []
        async for rollout in collect(attempts, parts, limits):
            num += 1
            if rollout.outcome is not Outcome.SCORED:
                lost.append(rollout)
            self.job.plugins.notify("katcore_rollout_finished", RolloutFinished(rollout))
            yield rollout
        if len(lost) > max(1, _MAX_LOST * num):
            first = lost[0]
            raise StageError(
                f"{len(lost)} of {num} rollouts were lost to infrastructure; the first, {first.id}:"
                f" {first.outcome}: {first.error}"
            )


@asynccontextmanager
async def open_rollouts(job: Job) -> AsyncIterator[Rollouts]:
    """Start the proxy and the preset's sandbox backend; both are stopped at the end."""
    name, options = job.preset.sandbox, job.preset.sandbox_options
    async with (
        open_backend(
            job.plugins, name, options, work=job.spec.id, schedule=job.preset.schedule
        ) as backend,
        Proxy(job.out / "calls.jsonl") as proxy,
    ):
        yield Rollouts(job, proxy, backend, Places(job.preset.concurrency))


def engine_settings(job: Job) -> dict[str, Any]:
    """What the preset and the seed say about an embedded engine."""
    preset = job.preset
    return {
        "num_slots": preset.concurrency,
        "context": preset.model.context,
        "seed": job.seed,
    }


def tasks_of(job: Job, expert: Expert, split: str) -> list[Task]:
    """The tasks that the expert's synthesis made, of one split."""
    root = job.input(f"{expert.name}.synthesize") / "tasks"
    tasks = list(job.plugins.make("dataset", expert.dataset, {"root": root}).tasks(split))
    if not tasks:
        raise StageError(f"expert {expert.name!r} has no task in split {split!r}; see {root}")
    return tasks


def samples_of(job: Job, expert: Expert, rollouts: Iterable[Rollout]) -> list[Sample]:
    """The training samples of rollouts, by the expert's formatter.

    Raises:
        StageError: that formatter makes no token trees.
    """
    formatter: Formatter[Any] = job.plugins.make(
        "formatter", expert.formatter, expert.formatter_options
    )
    samples = list(formatter.samples(rollouts))
    if not all(isinstance(sample, Sample) for sample in samples):
        raise StageError(
            f"expert {expert.name!r}: formatter {expert.formatter!r} makes no token trees;"
            " a stage trains on those of: tree, sft_tree, rl_tree, distill_tree"
        )
    return samples


class RolloutFile:
    """Rollouts on disk, one line each, appended as they end; a restart reads what is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        drop_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def append(self, rollout: Rollout) -> None:
        """Write one line."""
        self._file.write(to_json(rollout) + b"\n")

    def read(self) -> Iterator[Rollout]:
        """All so far."""
        return read_lines(Rollout, self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StepRollouts:
    """The rollouts of training steps, on disk as they end.

    What a killed process made for steps from `first` on is taken as made: a run that goes on learns from the
    very rollouts that it would have learnt from.
    """

    def __init__(self, path: Path, name: str, first: int) -> None:
        self._file = RolloutFile(path)
        self._name = name
        self._made: dict[int, list[Rollout]] = {}
        for rollout in self._file.read():
            step = int(rollout.id.partition(".")[0].removeprefix(f"{name}-"))
            if step >= first:
                self._made.setdefault(step, []).append(rollout)

    def label(self, step: int) -> str:
        """How the ids of the step's rollouts begin."""
        return f"{self._name}-{step}"

    def of(self, step: int) -> list[Rollout]:
        """Those of a step so far."""
        return self._made.get(step, [])

    async def make(
        self, rollouts: Rollouts, attempts: Iterable[Attempt], parts: Parts, step: int
    ) -> list[Rollout]:
        """Make the attempts of a step that are not made; returns all so far."""
        made = self._made.setdefault(step, [])
        done = {(item.domain, item.task_id, item.attempt) for item in made}
        missing = (
            item for item in attempts if (item.task.domain, item.task.id, item.number) not in done
        )
        async for rollout in rollouts.run(missing, parts, step):
            self._file.append(rollout)
            made.append(rollout)
        return made

    def forget(self, step: int) -> None:
        """Let go of a step's rollouts; the file keeps them."""
        self._made.pop(step, None)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def facts_of(rollouts: Sequence[Rollout], seconds: float = 0.0) -> dict[str, float]:
    """Mean reward and turns, the share lost to infrastructure, and speed, given how long they took.

    `entropy` is that of the sampled distribution, estimated from the log-probabilities of what was sampled.
    """
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    turns = [turn for rollout in rollouts for turn in rollout.trajectory.turns]
    sampled = [value for turn in turns if turn.origin == "sampled" for value in turn.logprobs]
    found = {
        "reward": statistics.fmean(rewards) if rewards else 0.0,
        "turns": len(turns) / max(1, len(rollouts)),
        "infra_failed_rate": 1 - len(rewards) / max(1, len(rollouts)),
        "entropy": -statistics.fmean(sampled) if sampled else 0.0,
    }
    return found | ({"sampled_per_s": len(sampled) / seconds} if seconds else {})
