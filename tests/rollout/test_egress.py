"""Where a task lets its agent go, in real sandboxes."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kat_sandboxes.local import LocalBackend, LocalConfig
from katcore.proxy.server import Proxy
from katcore.rollout.single import Attempt, Parts, run_rollout
from katcore.schema.call import Sampling
from katcore.schema.rollout import Outcome, Rollout
from katcore.schema.task import SandboxSpec, Task
from katcore.testing.redteam import scene
from tests.kat_sandboxes.machines import environment
from tests.rollout.fakes import FileVerifier

FETCH = """python3 - <<'E'
import urllib.request
for url in ("http://other.test/", "https://other.test/", "http://allowed.invalid/"):
    try: urllib.request.urlopen(url, timeout=20)
    except Exception as error: print(url, error)
E
echo "$HTTPS_PROXY $no_proxy"; python3 -c "import socket; socket.create_connection(('192.0.2.1', 443), 2)"
"""


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[LocalBackend]:
    made = LocalBackend(LocalConfig(images=tmp_path / "images", scaffolds=tmp_path / "scaffolds"))
    yield made
    await made.close()


async def attempt(
    tmp_path: Path, backend: LocalBackend, agent: scene.Agent, command: str, **facts: Any
) -> Rollout:
    spec = SandboxSpec(environment(tmp_path / "environment"))
    task = replace(Task("t", "d", "p", tmp_path, spec), **facts)
    async with Proxy(tmp_path / "calls.jsonl") as proxy:
        parts = Parts(proxy, backend, agent, FileVerifier(), Sampling(max_tokens=1 << 20))
        return await run_rollout("r", Attempt(task, scene.Script([command, "submit"])), parts)


async def test_an_allowlist_lets_nothing_else_out_and_is_on_record(
    tmp_path: Path, backend: LocalBackend
) -> None:
    hosts = ("allowed.invalid",)
    rollout = await attempt(
        tmp_path, backend, scene.Agent(), FETCH, egress="allowlist", allowed_hosts=hosts
    )
    assert rollout.outcome is Outcome.SCORED, rollout.error
    said = rollout.trajectory.turns[1].messages[0].content
    assert "http://other.test/ HTTP Error 403: Forbidden" in said
    assert "https://other.test/" in said
    assert "http://127.0.0.1:8823 localhost,127.0.0.1" in said
    assert "Network is unreachable" in said
    assert [(visit.host, visit.port, visit.address) for visit in rollout.visits] == [
        ("other.test", 80, ""),
        ("other.test", 443, ""),
        ("allowed.invalid", 80, ""),
    ]
    assert "not among the hosts" in rollout.visits[0].refused
    assert rollout.visits[2].refused
    assert "not among the hosts" not in rollout.visits[2].refused


async def test_without_one_there_is_no_way_out(tmp_path: Path, backend: LocalBackend) -> None:
    rollout = await attempt(tmp_path, backend, scene.Agent(), "env | grep -ci proxy; true")
    assert rollout.trajectory.turns[1].messages[0].content == "0"
    assert rollout.visits == ()


async def test_nothing_at_all_leaves_no_door_for_a_scaffold_inside(
    tmp_path: Path, backend: LocalBackend
) -> None:
    rollout = await attempt(tmp_path, backend, scene.InsideAgent(), "true", egress="none")
    assert rollout.outcome is Outcome.SCAFFOLD_FAILED
    assert "lets nothing out" in rollout.error
    other = await attempt(tmp_path, backend, scene.Agent(), "true", egress="none")
    assert other.outcome is Outcome.SCORED
