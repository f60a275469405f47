"""Tasks in Harbor's directory format, written and read.

    <task id>/task.toml          [metadata] id, domain, group, split, [metadata.traits]; limits
    <task id>/instruction.md     the prompt
    <task id>/environment/       Dockerfile and files: what the agent's sandbox is made from
    <task id>/tests/test.sh      the verifier's; never in the agent's sandbox
    <task id>/solution/          solve.sh, and demonstrations.json: the oracle's ways to solve it

Upstream format: https://harborframework.com/docs/tasks.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, ConfigDict

from katcore.errors import TaskError
from katcore.schema.expert import Demonstration
from katcore.schema.task import Egress, SandboxSpec, Task

_HOST = re.compile(r"(\*\.)?([a-z0-9_-]+\.)+[a-z][a-z0-9-]*(:[0-9]{1,5})?", re.IGNORECASE)
SPLITS = ("train", "held-out")
CANARIES = ("/solution/solve.sh",)
"""Where an agent that looks for the reference solution finds something else."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A task about to be written. File contents by relative path; `Dockerfile` among `environment`."""

    id: str
    domain: str
    prompt: str
    environment: Mapping[str, bytes]
    tests: Mapping[str, bytes]
    demonstrations: Sequence[tuple[str, Sequence[str]]]
    group: str = ""
    traits: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 60.0
    memory_mib: int = 512
    setup: str = ""


def write_task(root: Path, split: str, draft: Draft) -> Path:
    """Write one task directory under `root/split`; returns it.

    Raises:
        TaskError: unknown split, no `test.sh`, no Dockerfile, an id that names no folder, or one that
            exists already.
    """
    if split not in SPLITS:
        raise TaskError(f"{draft.id}: no split {split!r}; choose one of: {', '.join(SPLITS)}")
    for folder, name, files in (
        ("environment", "Dockerfile", draft.environment),
        ("tests", "test.sh", draft.tests),
    ):
        if name not in files:
            raise TaskError(f"{draft.id}: {folder}/ needs a {name}")
    if Path(draft.id).name != draft.id or draft.id in {"", ".."}:
        raise TaskError(f"task id {draft.id!r} is not the name of a folder")
    directory = root / split / draft.id
    if directory.exists():
        raise TaskError(f"{directory}: two tasks of one id")
    solve = "\n".join(draft.demonstrations[0][1][:-1]) if draft.demonstrations else ""
    ways = [{"style": style, "turns": list(turns)} for style, turns in draft.demonstrations]
    solution = {
        "solve.sh": f"#!/bin/bash\n{solve}\n".encode(),
        "demonstrations.json": json.dumps(ways).encode(),
    }
    for folder, files in (
        ("environment", draft.environment),
        ("tests", draft.tests),
        ("solution", solution),
    ):
        for name, data in files.items():
            path = directory / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (directory / "instruction.md").write_bytes(draft.prompt.encode())
    (directory / "task.toml").write_bytes(_toml(split, draft).encode())
    return directory


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _toml(split: str, draft: Draft) -> str:
    quote = _quote
    lines = [
        'version = "1.0"',
        "[metadata]",
        *(
            f"{key} = {quote(value)}"
            for key, value in (
                ("id", draft.id),
                ("domain", draft.domain),
                ("group", draft.group),
                ("split", split),
            )
        ),
        "[metadata.traits]",
        *(f"{quote(key)} = {quote(value)}" for key, value in sorted(draft.traits.items())),
        "[agent]",
        f"timeout_sec = {draft.timeout_s}",
        "[environment]",
        f"memory_mb = {draft.memory_mib}",
        *([f"setup = {quote(draft.setup)}"] if draft.setup else []),
    ]
    return "\n".join(lines) + "\n"


def read_task(directory: Path) -> Task:
    """The task of a directory.

    Raises:
        TaskError: a file is missing or malformed; says which.
    """
    for name in ("task.toml", "instruction.md", "environment/Dockerfile", "tests/test.sh"):
        if not (directory / name).is_file():
            raise TaskError(f"{directory}: not a task directory: no {name}")
    try:
        content: dict[str, Any] = tomllib.loads((directory / "task.toml").read_bytes().decode())
        metadata, environment = content.get("metadata", {}), content.get("environment", {})
        return Task(
            id=str(metadata.get("id", directory.name)),
            domain=str(metadata.get("domain", metadata.get("category", ""))),
            prompt=(directory / "instruction.md").read_bytes().decode(),
            directory=directory,
            sandbox=SandboxSpec(
                directory / "environment",
                memory_mib=int(environment.get("memory_mb", 512)),
                cpus=float(environment.get("cpus", 0)),
                keeps_history=_flag(metadata, "keep_git_history"),
            ),
            group=str(metadata.get("group", "")),
            split=str(metadata.get("split", "train")),
            timeout_s=float(content.get("agent", {}).get("timeout_sec", 60.0)),
            setup=str(environment.get("setup", "")),
            traits={str(key): str(value) for key, value in metadata.get("traits", {}).items()},
            canaries=_paths(metadata, "canaries", CANARIES),
            egress=_egress(content),
            allowed_hosts=_hosts(content.get("environment", {}).get("allowed_hosts", ())),
            services=_paths(metadata, "services", ()) if "services" in metadata else None,
        )
    except (tomllib.TOMLDecodeError, AttributeError, TypeError, ValueError) as error:
        raise TaskError(f"{directory}/task.toml: {error}") from error


def _egress(content: Mapping[str, Any]) -> Egress:
    """Harbor's `network_mode`, or our own `egress`. The whole internet is open to no task."""
    mode = content.get("environment", {}).get("network_mode", "")
    said = content.get("metadata", {}).get(
        "egress", "allowlist" if mode == "allowlist" else "proxy"
    )
    if said not in get_args(Egress):
        raise ValueError(f"egress is {said!r}; choose one of: {', '.join(get_args(Egress))}")
    return cast(Egress, said)


def _hosts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(_HOST.fullmatch(str(host)) for host in value):
        raise ValueError(
            f"allowed_hosts is {value!r}; it has to be a list of names, such as example.org, *.example.org or"
            " example.org:8443"
        )
    return tuple(host.lower() for host in value)


def _paths(table: Mapping[str, Any], name: str, default: tuple[str, ...]) -> tuple[str, ...]:
    value = table.get(name, default)
    if not isinstance(value, list | tuple) or not all(str(path).startswith("/") for path in value):
        raise TypeError(f"{name} is {value!r}; it has to be a list of absolute paths")
    return tuple(value)


def _flag(table: Mapping[str, Any], name: str) -> bool:
    value = table.get(name, False)
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it has to be true or false")
    return value


def demonstrations(task: Task) -> list[Demonstration]:
    """The oracle's ways to solve a task; empty if it came without.

    Raises:
        TaskError: its file is malformed.
    """
    path = task.directory / "solution" / "demonstrations.json"
    if not path.exists():
        return []
    try:
        return [
            Demonstration(task.id, item["style"], tuple(item["turns"]))
            for item in json.loads(path.read_bytes())
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise TaskError(f"{path}: {error!r}") from error


class HarborConfig(BaseModel):
    """Options of the Harbor dataset: a folder with `train/` and `held-out/`, or of task directories."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: Path


class HarborDataset:
    """The tasks of a folder `root/<split>/<task id>/`, in order of their ids.

    A folder that holds task directories itself has one split: `train`.
    """

    def __init__(self, config: HarborConfig) -> None:
        self._root = config.root

    def tasks(self, split: str) -> Iterator[Task]:
        """See `Dataset.tasks`.

        Raises:
            TaskError: no such split, or a directory in it is not a task.
        """
        folder = self._root / split
        if split == "train" and next(self._root.glob("*/task.toml"), None):
            folder = self._root
        if not folder.is_dir():
            found = ", ".join(sorted(p.name for p in self._root.glob("*/"))) or "nothing"
            raise TaskError(f"{self._root}: no split {split!r}; found: {found}")
        for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield read_task(directory)
