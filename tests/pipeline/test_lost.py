"""What infrastructure lost is made again where nothing was learnt from it, or is as if it had not been."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from katcore.config import DistillSettings, Preset, RlSettings
from katcore.errors import EngineError, StageError
from katcore.inference.chat import ChatTokenizer
from katcore.pipeline import distill
from katcore.pipeline.frontier import Frontier
from katcore.pipeline.learner import Learner
from katcore.pipeline.plan import StageSpec
from katcore.pipeline.rollouts import Rollouts, StepRollouts, facts_of, mixed, samples_of
from katcore.pipeline.stage import Job
from katcore.pipeline.stream import staleness_of
from katcore.plugin import Plugins
from katcore.proxy.server import Proxy
from katcore.rollout.collect import Work
from katcore.rollout.places import Places
from katcore.rollout.single import Attempt, Parts
from katcore.scaffold.mini import MiniConfig, MiniScaffold
from katcore.schema.call import Sampling
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Turn, Verdict
from katcore.train.policy import load_policy, save_policy
from katcore.train.trainer import Schedule, Trainer
from tests.inference.tiny import write_tiny_model
from tests.proxy.fakes import FakeEngine
from tests.rollout.fakes import FakeBackend, FileVerifier, a_task

SPEC = StageSpec("rl", "rl")


class Steps:
    """Makes rollouts of step 0 in a folder, by processes one after the other."""

    def __init__(self, root: Path, concurrency: int = 8) -> None:
        self.path = root / "rollouts.jsonl"
        self.engines: dict[str, FakeEngine] = {}
        preset = Preset(name="p", summary="", concurrency=concurrency)
        silent: Any = None
        self._job = Job(SPEC, preset, 0, Plugins({}), {}, root, root, silent)

    async def make(self, num: int, lost: Sequence[int] = (), domains: str = "d") -> list[Rollout]:
        """The rollouts of `num` attempts, the first half of which are of the first domain."""
        job = self._job
        made = StepRollouts(self.path, "rl", 0)
        async with Proxy(job.out / "calls.jsonl") as proxy:
            rollouts = Rollouts(job, proxy, FakeBackend(), Places(job.preset.concurrency))
            scaffold = MiniScaffold(MiniConfig())
            parts = Parts(proxy, rollouts.backend, scaffold, FileVerifier(), Sampling())
            try:
                return await made.make(rollouts, list(self._work(num, lost, domains, parts)), 0)
            finally:
                made.close()

    def _work(self, num: int, lost: Sequence[int], domains: str, parts: Parts) -> Iterator[Work]:
        for number in range(num):
            task = replace(a_task(number), domain=domains[number * len(domains) // num])
            fails = [EngineError("gone")] * 9 if number in lost else ["submit"]
            engine = self.engines[task.id] = FakeEngine(*fails)
            yield Attempt(task, engine, label="rl-0"), parts

    def asked(self) -> list[str]:
        """The tasks that the last process made rollouts of."""
        return [name for name, engine in self.engines.items() if engine.requests]


def rewards(made: Sequence[Rollout]) -> list[float | None]:
    return [rollout.reward for rollout in made]


async def test_those_of_a_step_that_lost_too_many_are_tried_again(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    with pytest.raises(StageError, match="3 of 20 rollouts were lost to infrastructure"):
        await steps.make(20, lost=(2, 5, 11))
    with pytest.raises(StageError, match="3 of 20 rollouts were lost to infrastructure"):
        await steps.make(20, lost=(2, 5, 11))
    made = await steps.make(20)
    assert steps.asked() == ["t2", "t5", "t11"]
    assert rewards(made) == [0.0] * 20
    assert len({rollout.task_id for rollout in made}) == 20
    again = await steps.make(20)
    assert steps.asked() == []
    assert again == made, "and in the same order"


async def test_those_of_a_step_that_may_be_learnt_from_stay_lost(tmp_path: Path) -> None:
    """So that a run that goes on has the next loss of one that was not killed."""
    steps = Steps(tmp_path)
    made = await steps.make(20, lost=(3, 4))
    assert rewards(made).count(None) == 2
    assert await steps.make(20) == made
    assert steps.asked() == []
    whole = steps.path.read_bytes().splitlines(keepends=True)
    steps.path.write_bytes(b"".join(line for line in whole if b".t19." not in line))
    assert rewards(await steps.make(20)) == [0.0] * 20
    assert steps.asked() == ["t3", "t4", "t19"], "a step that was not complete"


async def test_nothing_is_not_enough_of_a_step_nor_of_a_domain(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    with pytest.raises(StageError, match="1 of 1 rollouts were lost"):
        await steps.make(1, lost=(0,))
    assert rewards(await steps.make(1)) == [0.0]
    other = Steps(tmp_path / "other")
    other.path.parent.mkdir()
    # 2 of 20 are a tenth, but all of one of ten domains.
    with pytest.raises(StageError, match="2 of 2 rollouts were lost"):
        await other.make(20, lost=(18, 19), domains="abcdefghij")


@given(st.lists(st.integers(0, 9), max_size=4))
def test_what_is_mixed_comes_evenly_and_in_order(sizes: list[int]) -> None:
    parts: Any = [[(name, at) for at in range(num)] for name, num in enumerate(sizes)]
    found: Any = mixed(parts)
    assert [[one for one in found if one[0] == name] for name in range(len(sizes))] == parts
    for num in range(len(found) + 1):
        for name, size in enumerate(sizes):
            share = num * size / len(found) if found else 0
            assert abs(sum(one[0] == name for one in found[:num]) - share) <= 1 + len(sizes) / 2


async def test_a_slow_domain_keeps_no_other_waiting(tmp_path: Path) -> None:
    """With places for four, eight of the quick domain end while those of the slow one have not."""
    steps = Steps(tmp_path, concurrency=4)
    made = StepRollouts(steps.path, "distill", 0)
    job, ended, go = steps._job, [], asyncio.Event()

    class Slow(FakeEngine):
        async def generate(self, request: Any) -> Any:
            await go.wait()
            return await super().generate(request)

    class Quick(FakeEngine):
        async def generate(self, request: Any) -> Any:
            ended.append(request)
            if len(ended) == 8:
                go.set()
            return await super().generate(request)

    async with Proxy(job.out / "calls.jsonl") as proxy:
        rollouts = Rollouts(job, proxy, FakeBackend(), Places(4))
        parts = Parts(
            proxy, rollouts.backend, MiniScaffold(MiniConfig()), FileVerifier(), Sampling()
        )
        work = [
            [
                (
                    Attempt(replace(a_task(at), domain=domain), kind("submit"), label="distill-0"),
                    parts,
                )
                for at in range(num)
            ]
            for domain, kind, num in (("slow", Slow, 4), ("quick", Quick, 12))
        ]
        found = await asyncio.wait_for(made.make(rollouts, mixed(work), 0), 20)
    assert len(found) == 16
    assert [one.domain for one in found[:6]] == ["quick"] * 6


def rollout(number: int, reward: float | None, *, num_turns: int = 2) -> Rollout:
    """Of one of two tasks; each turn goes on from the one before it."""
    turns = []
    for turn in range(num_turns):
        ids = tuple(3 + (number * 37 + turn * 11 + at) % 200 for at in range(8))
        logprobs = tuple(-5.0 - 0.1 * (at % 3) for at in range(5))
        shared = 8 * turn
        turns.append(Turn(turn - 1, 0, shared, ids[:3], ids[3:], logprobs, (), "ls", f"{turn}"))
    name, outcome = f"r{number}", Outcome.SCORED if reward is not None else Outcome.ENGINE_FAILED
    # What a verifier may have said of one that failed later is no reward.
    verdict = Verdict(1.0 if reward is None else reward)
    trajectory = Trajectory(name, tuple(turns))
    return Rollout(
        name, f"t{number % 2}", "terminal", f"g{number % 2}", number, outcome, trajectory, verdict
    )


SCORED = [rollout(number, float(number % 3 == 0), num_turns=1 + number % 2) for number in range(8)]
Lost = list[tuple[int, int]]
lost = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), max_size=6)
"""Where one that was lost stands among those that were scored, and how many turns it had."""


def with_lost(given: Lost) -> list[Rollout]:
    made = list(SCORED)
    for number, (place, num_turns) in enumerate(given):
        made.insert(place, rollout(100 + number, None, num_turns=num_turns))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and a teacher that is another model."""
    root = tmp_path_factory.mktemp("lost")
    for name in ("student", "teacher"):
        write_tiny_model(root / name)
    teacher = load_policy(root / "teacher")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_policy(teacher, root / "teacher", tokenizer=root / "teacher")
    return root


Learnt = tuple[dict[str, float], torch.Tensor]
"""The metrics of a step and the weights after it."""
_OF_TIME = {"tokens_per_s", "infra_failed_rate"}


def job(folder: Path, **given: Any) -> Job:
    silent: Any = None
    preset = Preset(name="p", summary="", **given)
    return Job(SPEC, preset, 0, Plugins.installed(), {}, folder, folder, silent)


def ended(trainer: Trainer, metrics: dict[str, float]) -> Learnt:
    weights = torch.cat([one.detach().flatten() for one in trainer.model.parameters()])
    return {name: value for name, value in metrics.items() if name not in _OF_TIME}, weights


def reinforced(folder: Path, made: list[Rollout]) -> Learnt:
    own = job(folder)
    samples = samples_of(own, own.plugins.experts()["terminal"], made)
    trainer = Trainer(load_policy(folder / "student"), Schedule(1e-2, 10))
    rl = RlSettings(level="turn", epochs=1, kl=0.1, entropy=0.01, correction="icepop")
    start = load_policy(folder / "student").requires_grad_(False)
    learner = Learner(trainer, rl, None, seed=0, at_once=4, reference=start)
    frontier = Frontier([], 0)
    frontier.learn(made)
    metrics = facts_of(made, 2.0) | staleness_of(made, 5) | frontier.rates
    return ended(trainer, metrics | asyncio.run(learner.learn(samples)))


def distilled(folder: Path, made: list[Rollout]) -> Learnt:
    given = DistillSettings(objective="policy-gradient", rewards=True, group=4, mean="domain")
    own = job(folder, distill=given)
    trainer = Trainer(load_policy(folder / "student"), Schedule(1e-2, 10))
    expert = own.plugins.experts()["terminal"]
    domain = distill.Domain(expert, [], folder / "teacher", given)
    loop = distill._Loop(own, trainer, ChatTokenizer(folder / "student"), [domain])
    return ended(trainer, facts_of(made, 2.0) | staleness_of(made, 5) | loop._learn(made))


@pytest.fixture(scope="module")
def without(folder: Path) -> dict[Any, Learnt]:
    """What is learnt where nothing was lost."""
    found = {learn: learn(folder, SCORED) for learn in (reinforced, distilled)}
    for metrics, _ in found.values():
        assert metrics["loss"] != 0
        assert metrics["grad_norm"] > 0
        assert metrics["sampled_per_s"] > 0
        assert metrics["turns"] == 1.5
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("learn", [reinforced, distilled])
@given(lost=lost)
@settings(max_examples=12)
def test_what_was_lost_changes_no_advantage_loss_gradient_or_metric(
    folder: Path, without: dict[Any, Learnt], learn: Any, lost: Lost
) -> None:
    """The weights after the step are the same bit by bit."""
    made = with_lost(lost)
    metrics, weights = learn(folder, made)
    assert metrics == without[learn][0]
    assert torch.equal(weights, without[learn][1])
    assert facts_of(made)["infra_failed_rate"] == pytest.approx(len(lost) / len(made))


def test_of_nothing_nothing_is_said() -> None:
    assert facts_of([rollout(1, None)], 2.0) == {"infra_failed_rate": 1.0}
    assert facts_of([], 2.0) == {"infra_failed_rate": 0.0}
