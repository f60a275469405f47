"""The benchmark of sandboxes, in small: its figures are there and hang together."""

import json
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from katcore.bench import holding, sandbox
from katcore.bench.sandbox import Settings
from katcore.cli import app
from katcore.errors import NoCapacityError
from katcore.plugin import Plugins
from katcore.protocols import Sandbox
from katcore.schema.task import SandboxSpec
from tests.rollout.fakes import FakeSandbox

SMALL = Settings(backends=("local", "nothing"), concurrency=(1, 2), starts=4, hold=3, floor=10)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))
    return tmp_path


async def test_each_backend_is_measured_and_one_that_is_not_there_is_said(home: Path) -> None:
    steps: list[str] = []
    report = await sandbox.run(SMALL, home / "bench", Plugins.installed(), steps.append)
    found = report.as_json()
    local = found["local"]
    assert report.is_sound
    assert (local["alive"], local["answering"], local["held"]["doors"]) == (3, 3, 3)
    assert [level["concurrency"] for level in local["levels"]] == [1, 2]
    for level in local["levels"]:
        assert 0 < level["warm_ms_p50"] <= level["warm_ms_p95"]
        assert level["warm_ms_p50"] < level["cold_ms_p50"] <= level["cold_ms_p95"]
    assert 0 < local["starts_per_s"] < found["floor_per_s"]
    assert local["seconds_1000"] > 0
    assert "nothing" in found["nothing"]["error"]
    assert len(steps) <= SMALL.num_parts
    assert list((home / "bench").iterdir()) == []


@pytest.mark.parametrize("num", [1, 500, 501, 10_000, 100_003])
def test_no_shard_holds_more_than_its_descriptors_allow(num: int) -> None:
    parts = holding.shares(num)
    assert sum(parts) == num
    assert max(parts) * 3 < resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert max(parts) - min(parts) <= 1


async def test_what_stops_the_opening_is_said(home: Path) -> None:
    class Full:
        """A backend with room for two."""

        left = 2

        @asynccontextmanager
        async def open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
            if not self.left:
                raise NoCapacityError("full")
            self.left -= 1
            yield FakeSandbox()

        async def close(self) -> None:
            pass

    share = {"num": 5, "opening": 1, "shards": 1}
    async with AsyncExitStack() as opened:
        kept, why = await holding.fill(Full(), SandboxSpec(home), share, opened)
    assert (len(kept), why) == (2, "NoCapacityError: full")


def test_from_the_command_line(home: Path) -> None:
    options = ["--concurrency", "1", "--starts", "2", "--hold", "2"]
    run = CliRunner().invoke(app, ["bench", "sandbox", *options, "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    wanted = {"warm_ms_p50", "cold_ms_p50", "starts_per_s", "mib_each", "alive", "answering"}
    assert wanted | {"seconds_1000"} <= found["local"].keys()
    assert found["floor_per_s"] > 0
    run = CliRunner().invoke(app, ["bench", "sandbox", *options])
    assert run.exit_code == 0, run.output
    assert "bare clone and exec" in run.output
