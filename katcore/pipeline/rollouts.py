"""What the stages that make rollouts share: proxy, sandboxes, the experts' parts, and durable results."""

import statistics
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katcore.errors import StageError
from katcore.pipeline.stage import Job
from katcore.protocols import Formatter, SandboxBackend
from katcore.proxy.server import Proxy
from katcore.rollout.collect import Limits, Work, collect_mixed
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
        num = 0
        lost: list[Rollout] = []
        async for rollout in self.mixed(((attempt, parts) for attempt in attempts), rank):
            num += 1
            if rollout.outcome is not Outcome.SCORED:
                lost.append(rollout)
            yield rollout
        if _is_too_many(len(lost), num):
            raise _lost(lost, num)

    async def mixed(self, work: Iterable[Work], rank: int = 0) -> AsyncIterator[Rollout]:
        """As `run`, of several experts' attempts; however many are lost."""
        limits = Limits(self.job.preset.concurrency, self.places, rank)
        async for rollout in collect_mixed(work, self.backend, limits):
            self.job.plugins.notify("katcore_rollout_finished", RolloutFinished(rollout))
            yield rollout


def _is_too_many(num_lost: int, num: int) -> bool:
    return num_lost > max(1, _MAX_LOST * num)


def _lost(lost: Sequence[Rollout], num: int) -> StageError:
    first = lost[0]
    return StageError(
        f"{len(lost)} of {num} rollouts were lost to infrastructure; the first, {first.id}:"
        f" {first.outcome}: {first.error}. See to that, and run the same command to go on"
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
    very rollouts that it would have learnt from. Of a step that was not complete, or had lost too many to be
    learnt from, those that were lost to infrastructure are tried again.
    """

    def __init__(self, path: Path, name: str, first: int) -> None:
        self._file = RolloutFile(path)
        self._name = name
        self._made: dict[int, dict[_Key, Rollout]] = {}
        for rollout in self._file.read():
            step = int(rollout.id.partition(".")[0].removeprefix(f"{name}-"))
            if step >= first:
                _put(self._made.setdefault(step, {}), rollout)

    def label(self, step: int) -> str:
        """How the ids of the step's rollouts begin."""
        return f"{self._name}-{step}"

    async def make(self, rollouts: Rollouts, work: Sequence[Work], step: int) -> list[Rollout]:
        """Make the attempts of a step that are not made; returns all.

        Raises:
            StageError: more than a tenth of a domain's were lost to infrastructure, or all.
        """
        made = self._made.setdefault(step, {})
        if len(made) < len(work) or _too_few(made.values()):
            for key in [key for key, item in made.items() if item.outcome is not Outcome.SCORED]:
                del made[key]
        missing = [
            (one, parts)
            for one, parts in work
            if (one.task.domain, one.task.id, one.number) not in made
        ]
        async for rollout in rollouts.mixed(missing, step):
            self._file.append(rollout)
            _put(made, rollout)
        if error := _too_few(made.values()):
            raise error
        return list(made.values())

    def forget(self, step: int) -> None:
        """Let go of a step's rollouts; the file keeps them."""
        self._made.pop(step, None)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_Key = tuple[str, str, int]
"""Domain, task and number of an attempt."""


def _put(made: dict[_Key, Rollout], rollout: Rollout) -> None:
    """As the last one, in place of an earlier one of the same attempt."""
    key = (rollout.domain, rollout.task_id, rollout.attempt)
    made.pop(key, None)
    made[key] = rollout


def _too_few(made: Iterable[Rollout]) -> StageError | None:
    """Why a step's rollouts are not learnt from, None if they are."""
    num, lost = Counter[str](), list[Rollout]()
    for rollout in made:
        num[rollout.domain] += 1
        if rollout.outcome is not Outcome.SCORED:
            lost.append(rollout)
    if lost and len(lost) == num.total():
        return _lost(lost, len(lost))
    for domain, num_own in num.items():
        own = [rollout for rollout in lost if rollout.domain == domain]
        if _is_too_many(len(own), num_own):
            return _lost(own, num_own)
    return None


def mixed(parts: Sequence[Sequence[Work]]) -> list[Work]:
    """All of them, each part spread evenly from the first to the last."""
    places = [((at + 0.5) / len(part), one) for part in parts for at, one in enumerate(part)]
    return [one for _, one in sorted(places, key=lambda place: place[0])]


def facts_of(rollouts: Sequence[Rollout], seconds: float = 0.0) -> dict[str, float]:
    """Mean reward and turns, the share lost to infrastructure, and speed, given how long they took.

    All but that share is of what was scored; of nothing nothing is said. `entropy` is that of the sampled
    distribution, estimated from the log-probabilities of what was sampled.
    """
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    found = {"infra_failed_rate": 1 - len(scored) / len(rollouts) if rollouts else 0.0}
    if not scored:
        return found
    turns = [turn for rollout in scored for turn in rollout.trajectory.turns]
    sampled = [value for turn in turns if turn.origin == "sampled" for value in turn.logprobs]
    found |= {
        "reward": statistics.fmean(rollout.reward or 0.0 for rollout in scored),
        "turns": len(turns) / len(scored),
        "entropy": -statistics.fmean(sampled) if sampled else 0.0,
    }
    return found | ({"sampled_per_s": len(sampled) / seconds} if seconds else {})
