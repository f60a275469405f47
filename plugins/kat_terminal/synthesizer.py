"""Writes terminal tasks: scenes drawn by kind, as Harbor task directories."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from kat_terminal import direct, reading
from kat_terminal.scene import Draw, Scene
from katcore.dataset.harbor import Draft, write_task
from katcore.errors import TaskError

KINDS = {kind.__name__: kind for kind in (*direct.KINDS, *reading.KINDS)}
_NEEDS = {"json_value": "jq", "json_order": "jq"}
"""Programs that not every machine has; their kinds are left out where they are missing."""
_READING = frozenset(kind.__name__ for kind in reading.KINDS)
_READING_SHARE = 0.5
_WORKDIR = "/work"


class TerminalConfig(BaseModel):
    """Options of the synthesizer: how many tasks of each split, and of which kinds (all by default)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: int = Field(default=1200, ge=1)
    held_out: int = Field(default=400, ge=1)
    kinds: tuple[str, ...] = ()


class TerminalSynthesizer:
    """Half of the tasks need reading; within each half the kinds are equally many."""

    def __init__(self, config: TerminalConfig) -> None:
        unknown = [name for name in config.kinds if name not in KINDS]
        if unknown:
            raise TaskError(f"no terminal kind named {unknown[0]!r}; there are: {', '.join(KINDS)}")
        self._config = config
        missing = {kind for kind, program in _NEEDS.items() if not shutil.which(program)}
        self._missing = missing - set(config.kinds)
        self._kinds = config.kinds or tuple(kind for kind in KINDS if kind not in missing)

    def synthesize(self, out: Path, *, seed: int, report: Callable[[str], None]) -> None:
        """See `Synthesizer.synthesize`. The held-out split is the same for all seeds."""
        for kind in sorted(self._missing):
            report(f"without kind {kind!r}: it needs {_NEEDS[kind]}, which is not installed")
        taken: set[str] = set()
        splits = (
            ("held-out", "held-out", self._config.held_out),
            ("train", f"train-{seed}", self._config.train),
        )
        for split, source, num in splits:
            for number, (kind, scene) in enumerate(self._scenes(source, num, taken)):
                write_task(
                    out,
                    split,
                    draft(f"terminal-{kind.replace('_', '-')}-{number:04d}", kind, scene),
                )
                if number % 100 == 0:
                    report(f"{split}: {number} of {num} tasks")

    def _scenes(self, source: str, num: int, taken: set[str]) -> Iterator[tuple[str, Scene]]:
        order = _order(self._kinds, num)
        for number, kind in enumerate(order):
            for attempt in range(1000):
                scene = KINDS[kind](Draw(f"{source}/{kind}/{number}/{attempt}"))
                identity = f"{scene.prompt}\0{sorted(scene.expected.items())}"
                if identity not in taken:
                    taken.add(identity)
                    yield kind, scene
                    break
            else:
                raise TaskError(
                    f"terminal kind {kind!r} has no more tasks; ask for fewer than {num}"
                )


def _order(kinds: tuple[str, ...], num: int) -> Iterator[str]:
    """Kind by kind in turn, reading ones as often as all others together."""
    groups = [[k for k in kinds if k in _READING], [k for k in kinds if k not in _READING]]
    groups = [group for group in groups if group]
    counts = [0] * len(groups)
    for number in range(num):
        which = number % len(groups)
        yield groups[which][counts[which] % len(groups[which])]
        counts[which] += 1


def draft(task_id: str, kind: str, scene: Scene) -> Draft:
    """A scene as a task."""
    files = {f"files/{name}": text.encode() for name, text in scene.files.items()}
    if scene.commit:
        files |= _repository(scene)
    dockerfile = f"FROM host\nCOPY files {_WORKDIR}\nWORKDIR {_WORKDIR}\n"
    expected = {f"expected/{name}": text.encode() for name, text in scene.expected.items()}
    choose = Draw(task_id).random
    other = choose.choice((_careful(scene), _retry(scene)))
    return Draft(
        task_id,
        "terminal",
        scene.prompt,
        {"Dockerfile": dockerfile.encode(), **files},
        {"test.sh": _test(scene).encode(), **expected},
        [("hindsight", [*scene.solve, "submit"]), other],
        group=kind,
        traits={"kind": kind, "needs_reading": str(kind in _READING).lower()},
    )


def _careful(scene: Scene) -> tuple[str, list[str]]:
    return "careful", [scene.look, *scene.solve, scene.confirm, "submit"]


def _retry(scene: Scene) -> tuple[str, list[str]]:
    return "retry", [scene.wrong, *scene.solve, "submit"]


def _test(scene: Scene) -> str:
    """The whole folder must be as expected: what was asked for is there, and nothing else changed."""
    conditions = [*scene.checks, "diff -r -x .git /tests/expected . >/dev/null"]
    return (
        f"if {' && '.join(conditions)}; then echo 1; else echo 0; fi > /logs/verifier/reward.txt\n"
    )


def _repository(scene: Scene) -> dict[str, bytes]:
    """The files of a `.git` folder, the same bytes every time."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, text in scene.files.items():
            (root / name).write_text(text)
        stamp = "2024-01-01T00:00:00Z"
        environment = {
            "PATH": os.defpath,
            "HOME": folder,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_AUTHOR_DATE": stamp,
            "GIT_COMMITTER_DATE": stamp,
        }
        identity = ["-c", "user.name=kat", "-c", "user.email=kat@localhost"]
        for command in (
            ["init", "-q", "-b", "main", "--template="],
            ["add", "-A"],
            [*identity, "commit", "-q", "--allow-empty", "-m", scene.commit],
        ):
            subprocess.run(["git", *command], cwd=root, env=environment, check=True)
        (root / ".git" / "index").unlink()
        return {
            f"files/{path.relative_to(root)}": path.read_bytes()
            for path in sorted((root / ".git").rglob("*"))
            if path.is_file()
        }
