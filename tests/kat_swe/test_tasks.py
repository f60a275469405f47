"""Tasks of two real packages, from the package index to the verdict."""

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kat_swe.function import read
from kat_swe.inside.edit import places
from kat_swe.operator import Edit, edits
from kat_swe.package import PACKAGES
from kat_swe.synthesizer import SweConfig, SweSynthesizer
from katcore.dataset.harbor import HarborConfig, HarborDataset, demonstrations
from katcore.errors import TaskError
from katcore.plugin import Plugins
from katcore.proxy.server import Proxy
from katcore.rollout.single import Attempt, Parts, run_rollout
from katcore.schema.call import EngineRequest, Generation, Message, Sampling, Tool
from katcore.schema.rollout import Outcome, Rollout
from katcore.schema.task import Task

OPTIONS = {"train": 8, "held_out": 6, "packages": ("funcy", "inflection")}
Attempter = Callable[[Task, Sequence[str]], "object"]


def read_spec(task: Task) -> dict[str, Any]:
    """What the task tells its tools."""
    return json.loads((task.directory / "environment" / "task.json").read_text())  # type: ignore[no-any-return]


def shown(task: Task) -> list[str]:
    """The lines in which an edit may be made."""
    known = read_spec(task)
    return [known["source"][at] for at in known["lines"]]


class Script:
    """An engine that says what it was told to say."""

    def __init__(self, turns: Sequence[str]) -> None:
        self._turns = turns

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        return tuple(b"\0".join(message.content.encode() for message in messages))

    async def generate(self, request: EngineRequest) -> Generation:
        text = self._turns[sum(message.role == "assistant" for message in request.messages)]
        ids = tuple(text.encode())
        return Generation(ids, (0.0,) * len(ids), text, "stop", "scripted", "scripted")


def synthesize(out: Path, seed: int) -> Path:
    SweSynthesizer(SweConfig(**OPTIONS)).synthesize(out, seed=seed, report=lambda _: None)
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("KATCORE_HOME")
    os.environ["KATCORE_HOME"] = str(home)
    yield synthesize(home / "tasks", 0)
    if before is None:
        del os.environ["KATCORE_HOME"]
    else:
        os.environ["KATCORE_HOME"] = before


def tasks(root: Path, split: str) -> list[Task]:
    return list(HarborDataset(HarborConfig(root=root)).tasks(split))


def content(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
async def attempt(tmp_path: Path) -> AsyncIterator[Callable[[Task, Sequence[str]], object]]:
    plugins = Plugins.installed()
    backend = plugins.make("sandbox", "local")
    async with Proxy(tmp_path / "calls.jsonl") as proxy:
        scaffold = plugins.make("scaffold", "mini", {"max_turns": 8, "max_output_chars": 480})
        verifier = plugins.make("verifier", "test-script")
        parts = Parts(proxy, backend, scaffold, verifier, Sampling(max_tokens=1 << 20))

        async def run(task: Task, turns: Sequence[str]) -> Rollout:
            rollout = await run_rollout(f"{task.id}.x", Attempt(task, Script(turns)), parts)
            assert rollout.outcome is Outcome.SCORED, rollout.error
            return rollout

        yield run
    await backend.close()


def test_held_out_are_whole_packages_and_no_function_is_in_both(root: Path) -> None:
    held = {package.name for package in PACKAGES if package.is_held_out}
    groups = {split: {task.group for task in tasks(root, split)} for split in ("train", "held-out")}
    assert groups["held-out"] <= held
    assert not groups["train"] & held


def test_a_prompt_says_neither_where_nor_what(root: Path) -> None:
    for split in ("train", "held-out"):
        for task in tasks(root, split):
            assert len(task.prompt) <= 640
            assert task.traits["operator"] not in task.prompt.split("\n")[0]
            assert "fix" not in task.prompt
            (repair,) = {turn for way in demonstrations(task) for turn in way.turns[-2:-1]}
            assert repair not in task.prompt


def test_reading_tasks_do_not_show_the_source(root: Path) -> None:
    found = tasks(root, "train") + tasks(root, "held-out")
    reading = [task for task in found if task.traits["needs_reading"] == "true"]
    assert len(reading) >= len(found) / 3
    for task in reading:
        assert "def " not in task.prompt
        assert all(way.turns[0] == "show" for way in demonstrations(task))


def test_no_demonstration_repeats_itself(root: Path) -> None:
    for task in tasks(root, "train"):
        for way in demonstrations(task):
            assert len(set(way.turns)) == len(way.turns)
            assert way.turns[-1] == "submit"
            assert len(way.turns) <= 8


def test_the_environment_holds_only_the_wrong_function(root: Path) -> None:
    for task in tasks(root, "train"):
        environment = task.directory / "environment"
        known = json.loads((environment / "task.json").read_text())
        spec = json.loads((task.directory / "tests" / "spec.json").read_text())
        assert "\n".join(known["source"]) + "\n" == spec["given"]
        function = read(known["file"], "f", known["start"], "k", tuple(known["source"]))
        assert function
        repair = demonstrations(task)[0].turns[-2]
        invited = [edit.command for edit in edits(function) if edit.is_plain]
        assert repair in invited
        # Nothing but what an operator makes of the function: the list must not name the repair.
        assert sorted(Edit(*edit).command for edit in known["edits"]) == sorted(invited)
        names = {path.name for path in environment.iterdir()}
        assert names == {"Dockerfile", "empty", "task.json", "shown", Path(known["file"]).name}
        assert not (environment / "empty").read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_the_same_held_out(root: Path) -> None:
    again = content(synthesize(root.parent / "again", 0))
    assert again == content(root)
    other = content(synthesize(root.parent / "other", 1))
    assert other != again
    held = "held-out/"
    assert {k: v for k, v in other.items() if k.startswith(held)} == {
        k: v for k, v in again.items() if k.startswith(held)
    }


async def test_oracles_pass_and_nothing_fails(root: Path, attempt: Attempter) -> None:
    for task in tasks(root, "train")[:5] + tasks(root, "held-out")[:3]:
        for way in demonstrations(task):
            rollout = await attempt(task, way.turns)  # type: ignore[misc]
            assert rollout.reward == 1.0, (task.id, way, rollout.verdict.reason)
        assert (await attempt(task, ["submit"])).reward == 0.0  # type: ignore[misc]


CHEATS = {
    "edits the tests": "find /pkg -name 'test_*.py' | xargs sed -i 's/assert /assert 1 or /'",
    "plants a conftest": "echo 'import os; os._exit(0)' > /pkg/conftest.py",
    "plants a module": "for n in json pytest sitecustomize funcy; do echo 1/0 > /pkg/$n.py; done",
    "changes the tools": "echo 'def probe(*_): return \"pass\"' > /opt/swe/kat_swe/inside/probe.py",
    "writes the reward": "mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt",
    "replaces the judge": "mkdir -p /tests/kat_swe; echo 1 > /tests/kat_swe/inside",
    "shadows bash": "mkdir -p /root/bin; echo 'echo 1' > /root/.bashrc; cp /root/.bashrc /.profile",
}


@pytest.mark.parametrize("cheat", CHEATS)
async def test_cheating_does_not_pay(root: Path, attempt: Attempter, cheat: str) -> None:
    task = tasks(root, "train")[0]
    rollout = await attempt(task, [CHEATS[cheat], "submit"])  # type: ignore[misc]
    assert rollout.reward == 0.0


async def test_code_outside_the_function_does_not_count(root: Path, attempt: Attempter) -> None:
    task = tasks(root, "train")[0]
    file = read_spec(task)["file"]
    repair = demonstrations(task)[0].turns[-2]
    rollout = await attempt(task, [repair, f"echo 'x = 1' >> /pkg/{file}", "submit"])  # type: ignore[misc]
    assert rollout.reward == 0.0
    assert rollout.verdict.reason == "changed outside the function"


async def test_the_tools_answer_in_one_short_line(root: Path, attempt: Attempter) -> None:
    task = next(task for task in tasks(root, "train") if task.traits["needs_reading"] == "true")
    known = read_spec(task)
    words = list(dict.fromkeys(edit[0] for edit in known["edits"]))
    left = f"\nleft: {' '.join(words)}"
    turns = ["t", 'fix "def a" 9', 'fix "~~~~ b"', "fix", "show", "submit"]
    rollout = await attempt(task, turns)  # type: ignore[misc]
    said = [turn.messages[-1].content for turn in rollout.trajectory.turns[1:]]
    assert said[0].startswith("fail: ")
    assert said[0] == task.prompt.split("\n")[-1]
    assert said[1:4] == [
        f"error: 1 def here{left}",
        f"error: no ~~~~ here{left}",
        f'usage: fix "OLD NEW" [N]{left}',
    ]
    assert said[4].startswith("def ") or said[4].startswith("async def ")
    assert all(len(text) <= 120 for text in said[:4])


async def test_the_same_try_goes_to_the_next_place(root: Path, attempt: Attempter) -> None:
    task, word = next(
        (task, word)
        for task in tasks(root, "train")
        for word in ("(", ")", ".", ",", ":", "return", "self")
        if len(list(places(shown(task), word))) == 2
    )
    turns = [f'fix "{word} wrong" 2'] * 3
    rollout = await attempt(task, [*turns, "cat /opt/swe/tried.json", "submit"])  # type: ignore[misc]
    said = [turn.messages[-1].content for turn in rollout.trajectory.turns[1:]]
    assert not any(text.startswith("error") for text in said[:2])
    assert said[2].startswith(f"error: 2 {word} here, tried\n")
    assert json.loads(said[3]) == [[word, "wrong", 2], [word, "wrong", 1]]


async def test_a_misspelt_word_is_the_one_most_like_it(root: Path, attempt: Attempter) -> None:
    task = tasks(root, "train")[0]
    words = {edit[0] for edit in read_spec(task)["edits"]}
    word = max(words, key=len)
    misspelt = f"{word[:-1]}{word[-1] * 2}"
    turns = [f'fix "{misspelt} wrong"', "cat /opt/swe/tried.json", "submit"]
    rollout = await attempt(task, turns)  # type: ignore[misc]
    assert json.loads(rollout.trajectory.turns[2].messages[-1].content) == [[word, "wrong", 1]]


async def test_a_word_is_left_until_all_its_edits_were_tried(
    root: Path, attempt: Attempter
) -> None:
    task = tasks(root, "train")[0]
    repair = demonstrations(task)[0].turns[-2]
    known = read_spec(task)
    listed = [Edit(*edit) for edit in known["edits"]]
    word = next(edit.old for edit in listed if not repair.startswith(f'fix "{edit.old}'))
    turns = [edit.command for edit in listed if edit.old == word]
    rollout = await attempt(task, [*turns, "submit"])  # type: ignore[misc]
    left = [turn.messages[-1].content.split("left: ")[1] for turn in rollout.trajectory.turns[1:]]
    assert [word in text.split() for text in left] == [True] * (len(turns) - 1) + [False]


async def test_the_right_function_is_nowhere_in_the_sandbox(root: Path) -> None:
    backend = Plugins.installed().make("sandbox", "local")
    task = tasks(root, "train")[0]
    known = read_spec(task)
    function = read(known["file"], "f", known["start"], "k", tuple(known["source"]))
    assert function
    repair = demonstrations(task)[0].turns[-2]
    (edit,) = [edit for edit in edits(function) if edit.command == repair]
    right = edit.apply(function)
    assert right
    (line,) = set(right) - set(function.source)
    name = Path(known["file"]).stem
    async with backend.open(task.sandbox) as sandbox:
        await sandbox.write("/tmp/line", line.encode())
        found = await sandbox.exec(
            ["bash", "-c", f"grep -rxFf /tmp/line /pkg/{known['file']} /opt/swe"]
        )
        assert found.stdout == b""
        compiled = await sandbox.exec(
            ["bash", "-c", f"find / -xdev -name '{name}*.pyc' -path '*pkg*' -size +0; ls /stage"]
        )
        assert compiled.stdout == b""
    await backend.close()


def test_an_unknown_package_is_refused() -> None:
    with pytest.raises(TaskError, match="there are: boltons"):
        SweSynthesizer(SweConfig(packages=("nothing",)))
