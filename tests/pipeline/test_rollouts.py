"""Rollouts on disk survive a kill; a run that loses too many says so, after it gave what it has."""

from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from katcore.config import Preset
from katcore.errors import EngineError, StageError
from katcore.pipeline.plan import Plan, StageSpec
from katcore.pipeline.progress import Progress
from katcore.pipeline.rollouts import RolloutFile, Rollouts, samples_of
from katcore.pipeline.stage import Job
from katcore.plugin import Plugins, hookimpl
from katcore.proxy.server import Proxy
from katcore.rollout.single import Attempt, Parts
from katcore.scaffold.mini import MiniConfig, MiniScaffold
from katcore.schema.call import Message, Sampling
from katcore.schema.event import RolloutFinished
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Turn, Verdict
from tests.proxy.fakes import FakeEngine
from tests.rollout.fakes import FakeBackend, FileVerifier, a_task

SPEC = StageSpec("swe.evaluate", "evaluate", "swe")
PLAN = Plan(
    Preset(name="p", summary="", concurrency=8), 0, ("swe",), {SPEC.id: SPEC}, {SPEC.id: "k"}
)


def rollout(name: str) -> Rollout:
    messages = (Message("user", "Zeile\nzwei: é"),)
    turns = (Turn(-1, 0, 0, (1, 2), (3,), (-0.5,), messages, "ls", "7"),)
    return Rollout(name, "t", "d", "g", 0, Outcome.SCORED, Trajectory(name, turns), Verdict(1.0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = RolloutFile(tmp_path / "rollouts.jsonl")
    for name in ("a", "b"):
        file.append(rollout(name))
    file.close()
    return file.path


def test_what_is_appended_is_read_at_once(path: Path) -> None:
    file = RolloutFile(path)
    file.append(rollout("c"))
    assert list(file.read()) == [rollout("a"), rollout("b"), rollout("c")]
    file.close()


def test_a_torn_last_line_is_dropped_wherever_it_tore(path: Path) -> None:
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for end in range(second, len(whole), 7):
        path.write_bytes(whole[:end])
        file = RolloutFile(path)
        assert list(file.read()) == [rollout("a")]
        file.append(rollout("b"))
        file.close()
        assert path.read_bytes() == whole


def test_a_file_that_was_never_whole_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b'{"id": "a')
    file = RolloutFile(path)
    assert list(file.read()) == []
    file.close()
    assert path.read_bytes() == b""


def test_a_broken_line_before_the_last_is_an_error(path: Path) -> None:
    path.write_bytes(b'{"id": "a\n' + path.read_bytes())
    file = RolloutFile(path)
    with pytest.raises(StageError, match="not a valid Rollout"):
        list(file.read())
    file.close()


class Observer(ModuleType):
    """A plugin that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__("observer")
        self.told: list[str] = []

        @hookimpl
        def katcore_rollout_finished(event: RolloutFinished) -> None:
            self.told.append(event.rollout.id)

        self.katcore_rollout_finished = katcore_rollout_finished


class Bench:
    """Rollouts of which some are lost; keeps what was yielded."""

    def __init__(self, root: Path) -> None:
        self.observer = Observer()
        self.yielded: list[Rollout] = []
        (root / "out").mkdir(exist_ok=True)
        self.job = Job(
            SPEC,
            PLAN.preset,
            0,
            Plugins({"observer": self.observer}),
            {},
            root,
            root / "out",
            Progress(SPEC, root, PLAN),
        )

    async def run(self, num: int, lost: int) -> None:
        backend = FakeBackend()
        async with Proxy(self.job.out / "calls.jsonl") as proxy:
            scaffold = MiniScaffold(MiniConfig())
            parts = Parts(proxy, backend, scaffold, FileVerifier(), Sampling())
            running = Rollouts(self.job, proxy, backend).run(attempts(num, lost), parts)
            async with aclosing(running):  # type: ignore[type-var]
                async for rollout in running:
                    self.yielded.append(rollout)


def attempts(num: int, lost: int) -> Iterator[Attempt]:
    for number in range(num):
        engine = FakeEngine(*[EngineError("out of memory")] * 9 if number < lost else ["submit"])
        yield Attempt(a_task(number), engine)


@pytest.mark.parametrize(("num", "lost"), [(0, 0), (3, 0), (1, 1), (5, 1), (20, 2)])
async def test_a_tenth_or_one_may_be_lost(tmp_path: Path, num: int, lost: int) -> None:
    bench = Bench(tmp_path)
    await bench.run(num, lost)
    assert len(bench.yielded) == num
    assert [item.reward for item in bench.yielded].count(None) == lost
    assert bench.observer.told == [item.id for item in bench.yielded]


@pytest.mark.parametrize(("num", "lost"), [(2, 2), (5, 2), (20, 3)])
async def test_more_is_an_error_once_all_were_given(tmp_path: Path, num: int, lost: int) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(StageError) as caught:
        await bench.run(num, lost)
    assert {item.task_id for item in bench.yielded} == {f"t{number}" for number in range(num)}
    first = next(item for item in bench.yielded if item.reward is None)
    said = str(caught.value)
    assert said.startswith(f"{lost} of {num} rollouts were lost to infrastructure; the first, ")
    assert first.id in said
    assert "engine-failed" in said
    assert "out of memory" in said


def test_a_stage_trains_on_token_trees_only(tmp_path: Path) -> None:
    plugins = Plugins.installed()
    expert = plugins.experts()["swe"]
    (tmp_path / "out").mkdir()
    progress = Progress(SPEC, tmp_path, PLAN)
    job = Job(SPEC, PLAN.preset, 0, plugins, {}, tmp_path, tmp_path / "out", progress)
    made = [rollout("a"), rollout("b")]
    for name in (expert.formatter, "rl_tree"):
        samples = samples_of(job, replace(expert, formatter=name), made)
        assert [sample.rollout_id for sample in samples] == ["a", "b"]
    with pytest.raises(StageError, match="expert 'swe': formatter 'chat' makes no token trees"):
        samples_of(job, replace(expert, formatter="chat", formatter_options={}), made)
