"""What only containers have: images of an engine, limits of its storage, volumes, and its absence."""

import asyncio
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kat_sandboxes.docker.backend import DockerBackend
from kat_sandboxes.docker.config import DockerConfig
from kat_terminal.synthesizer import TerminalConfig, TerminalSynthesizer
from katcore.cli import app
from katcore.config import ScheduleSettings
from katcore.dataset.harbor import HarborConfig, HarborDataset, demonstrations
from katcore.errors import SandboxError, SandboxUnavailableError, TaskError
from katcore.plugin import Plugins
from katcore.protocols import Sandbox, SupportsChanges, SupportsHandle
from katcore.sandbox.image import ImageStore
from katcore.sandbox.scheduled import ScheduledBackend
from katcore.schema.codec import read_lines
from katcore.schema.rollout import Rollout, Trajectory
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.engine import BASE, client, marked
from tests.kat_sandboxes.machines import environment, output, python, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


def spec_of(folder: Path, dockerfile: str, **files: str) -> SandboxSpec:
    return SandboxSpec(environment(folder / "environment", dockerfile, **files))


async def carried(backend: DockerBackend, spec: SandboxSpec, command: str, look: str) -> str:
    """What is seen in a fresh sandbox of what a command changed in another."""
    async with backend.open(spec) as sandbox:
        await output(sandbox, command)
        archive = await changes_of(sandbox)
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        await sandbox.apply(archive)
        return await output(sandbox, look)


async def changes_of(sandbox: Sandbox) -> bytes:
    assert isinstance(sandbox, SupportsChanges)
    return await sandbox.changes()


async def test_the_machine_s_own_programs_are_an_image(
    backend: DockerBackend, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path, "FROM host\nCOPY a /work/\nENV WORD='a b'\nWORKDIR /work\n", a="x")
    async with backend.open(spec) as sandbox:
        assert await output(sandbox, 'cat a; echo " $WORD"; pwd') == "x a b\n/work"
        assert await python(sandbox, "import pytest, sys; print(sys.version_info[0])") == "3"
        with pytest.raises(AssertionError):
            await python(sandbox, "import pydantic")
        with pytest.raises(OSError, match="Read-only"):
            await sandbox.write("/usr/bin/x", b"")


async def test_terminal_tasks_run_unchanged(
    backend: DockerBackend, home: Path, tmp_path: Path
) -> None:
    made = TerminalSynthesizer(TerminalConfig(train=2, held_out=1))
    await asyncio.to_thread(made.synthesize, tmp_path, seed=1, report=lambda _: None)
    verifier = Plugins.installed().make("verifier", "test-script", {})
    for task in HarborDataset(HarborConfig(root=tmp_path)).tasks("train"):
        rewards = []
        for turns in ((), demonstrations(task)[0].turns):
            async with backend.open(task.sandbox) as sandbox:
                for turn in turns:
                    if turn != "submit":
                        await sandbox.exec(["bash", "-c", turn])
                archive = await changes_of(sandbox)
            async with backend.open(task.sandbox) as sandbox:
                assert isinstance(sandbox, SupportsChanges)
                await sandbox.apply(archive)
                verdict = await verifier.verify(task, sandbox, Trajectory("s", ()))
                rewards.append(verdict.reward)
        assert rewards == [0.0, 1.0], task.id


@pytest.mark.timeout(900)
async def test_kat_collect_runs_on_it(engine: str, home: Path, tmp_path: Path) -> None:
    for file, text in {
        "task.toml": "[agent]\ntimeout_sec = 60.0\n",
        "instruction.md": "Write the word hello into hello.txt.",
        "environment/Dockerfile": f"FROM {BASE}\nWORKDIR /repo\n",
        "tests/test.sh": "[ -f /repo/hello.txt ]; echo $((1 - $?)) > /logs/verifier/reward.txt\n",
    }.items():
        path = tmp_path / "tasks" / "first" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = {"name": "scripted", "turns": ["echo hello > hello.txt", "submit"]}
    config = {"tasks": "tasks", "scaffold": "mini", "engine": script, "traces": 0, "attempts": 2}
    config |= {"sandbox": {"name": "docker", "url": engine}}
    (tmp_path / "on-docker.yaml").write_text(json.dumps(config))
    done = await asyncio.to_thread(
        CliRunner().invoke, app, ["collect", str(tmp_path / "on-docker.yaml")]
    )
    assert done.exit_code == 0, done.output
    rollouts = list(read_lines(Rollout, home / "collections" / "on-docker" / "rollouts.jsonl"))
    assert [item.reward for item in rollouts] == [1.0, 1.0]
    assert marked(engine) == []


async def test_run_makes_an_image_once_per_content(
    backend: DockerBackend, engine: str, tmp_path: Path
) -> None:
    dockerfile = (
        f"FROM {BASE}\nCOPY . /work\nRUN date +%N > /made; cat /work/a >> /made\nWORKDIR /work\n"
    )
    spec = spec_of(tmp_path, dockerfile, a="one")
    said = []
    for text in ("one", "one", "two"):
        (spec.environment / "a").write_text(text)
        async with backend.open(spec) as sandbox:
            said.append(await output(sandbox, "cat /made"))
    assert said[0] == said[1] != said[2]
    assert [item[-3:] for item in said] == ["one", "one", "two"]


@pytest.mark.parametrize(
    ("dockerfile", "said"),
    [
        ("FROM host\nRUN true\n", "neither RUN nor stages"),
        (f"FROM {BASE} AS one\nFROM host\nCOPY --from=one /etc/passwd /x\n", "neither RUN nor stages"),
        (f"FROM {BASE}\nRUN echo why >&2; exit 3\n", "why"),
        (f"FROM {BASE}\nNONSENSE\n", "NONSENSE"),
        ("FROM a-local-one\n", "image of the local backend"),
    ],
)  # fmt: skip
async def test_what_cannot_be_built_says_why(
    backend: DockerBackend, home: Path, tmp_path: Path, dockerfile: str, said: str
) -> None:
    ImageStore(home / "images").build("a-local-one", environment(tmp_path / "named"))
    with pytest.raises(TaskError, match=said):
        async with backend.open(spec_of(tmp_path, dockerfile)):
            pass


async def test_without_a_dockerfile_it_says_so(backend: DockerBackend, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="Dockerfile: cannot be read"):
        async with backend.open(SandboxSpec(tmp_path)):
            pass


async def test_the_user_of_the_image_is_the_user(backend: DockerBackend, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, f"FROM {BASE}\nUSER agent\nWORKDIR /agent\n")
    async with backend.open(spec) as sandbox:
        await sandbox.write("/agent/mine", b"x")
        assert await output(sandbox, "id -un; echo $HOME; stat -c %U mine") == (
            "agent\n/agent\nagent"
        )
        with pytest.raises(PermissionError):
            await sandbox.write("/etc/passwd", b"")
    look = "stat -c '%U %a' mine; cat mine"
    assert await carried(backend, spec, "echo x > mine; chmod 600 mine", look) == "agent 600\nx"


async def test_what_the_image_says_of_its_start_does_not_reach_the_agent(
    backend: DockerBackend, tmp_path: Path
) -> None:
    spec = spec_of(
        tmp_path,
        f"FROM {BASE}\nENV LD_PRELOAD=/no/such.so PYTHONHOME=/none LD_LIBRARY_PATH=/none\n"
        'ENTRYPOINT ["false"]\nCMD ["false"]\nHEALTHCHECK CMD touch /checked\n',
    )
    async with backend.open(spec) as sandbox:
        result = await sandbox.exec(["sh", "-c", "echo $LD_PRELOAD $PYTHONHOME"])
        assert result.stdout == b"/no/such.so /none\n"


async def test_what_is_in_a_volume_is_carried_on(backend: DockerBackend, tmp_path: Path) -> None:
    dockerfile = f"FROM {BASE}\nCOPY a b /data/\nVOLUME /data\nWORKDIR /work\n"
    spec = spec_of(tmp_path, dockerfile, a="1", b="2")
    command = "cd /data; rm a; echo 3 > b; mkdir d; echo 4 > d/c; chmod 000 d; echo 5 > /work/e"
    look = "ls /data; cat /data/b; chmod 700 /data/d; cat /data/d/c /work/e"
    assert await carried(backend, spec, command, look) == "b\nd\n3\n4\n5"


async def test_nothing_changed_is_an_empty_archive(backend: DockerBackend, tmp_path: Path) -> None:
    async with backend.open(spec_of(tmp_path, f"FROM {BASE}\nWORKDIR /work\n")) as sandbox:
        assert "127.0.0.1\tlocalhost" in await output(sandbox, "cat /etc/hosts")
        await output(sandbox, "echo x > /tmp/x; echo x > /dev/shm/x")
        empty = await changes_of(sandbox)
        assert not empty.strip(b"\0")


async def test_a_deleted_file_that_the_engine_cannot_name_is_an_error(
    backend: DockerBackend, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path, f"FROM {BASE}\nRUN touch \"$(printf '/odd-\\377')\"\n")
    async with backend.open(spec) as sandbox:
        await output(sandbox, "rm /odd-*")
        with pytest.raises(ValueError, match="no UTF-8"):
            await changes_of(sandbox)


async def test_each_file_is_limited(backend: DockerBackend, tmp_path: Path) -> None:
    spec = replace(spec_of(tmp_path, f"FROM {BASE}\nWORKDIR /work\n"), disk_mib=8)
    async with backend.open(spec) as sandbox:
        await output(
            sandbox, "! head -c 20000000 /dev/zero > big; [ $(stat -c %s big) -le 8388608 ]"
        )
        with pytest.raises(OSError, match=r"too large|No space left"):
            await sandbox.write("/work/big", bytes(16 << 20))


async def test_containers_are_labelled_and_confined(
    engine: str, home: Path, tmp_path: Path
) -> None:
    made = DockerBackend(DockerConfig(url=engine, cpus=0.5))
    spec = replace(spec_of(tmp_path, f"FROM {BASE}\n"), serves="r1", memory_mib=100, tools=tmp_path)
    async with made.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsHandle)
        found = client(engine).inspect_container(sandbox.handle())
        assert found["Config"]["Labels"]["katcore.mark"] == made.mark()
        assert found["Config"]["Labels"]["katcore.serves"] == "r1"
        limits = found["HostConfig"]
        assert limits["CpuQuota"] / limits["CpuPeriod"] == 0.5
        assert limits["Memory"] == limits["MemorySwap"] == 100 << 20
        assert limits["NetworkMode"] == "none"
        assert not limits["Privileged"]
        assert {item["Destination"] for item in found["Mounts"] if item["RW"]} == {"/etc/hosts"}
        assert "environment" in await output(sandbox, "ls /opt/scaffold")
        await output(sandbox, "! touch /opt/scaffold/x")
    await made.close()


async def test_one_that_was_kept_ready_and_died_is_passed_over(
    engine: str, home: Path, tmp_path: Path
) -> None:
    docker = DockerBackend(DockerConfig(url=engine))
    made = ScheduledBackend(docker, docker.capacity(), ScheduleSettings(warm=1))
    spec = spec_of(tmp_path, f"FROM {BASE}\nWORKDIR /work\n")
    async with made.open(spec) as sandbox:
        await wait_until(lambda: len(marked(engine)) == 2, seconds=60)
        assert isinstance(sandbox, SupportsHandle)
        (ready,) = {*marked(engine)} - {sandbox.handle()}
    client(engine).remove_container(ready, force=True)
    async with made.open(spec) as sandbox:
        assert await output(sandbox, "echo on") == "on"
    await made.close()
    assert marked(engine) == []


async def test_a_cancelled_opening_leaves_nothing(engine: str, home: Path, tmp_path: Path) -> None:
    made = DockerBackend(DockerConfig(url=engine))
    spec = spec_of(tmp_path, f"FROM {BASE}\n")

    async def hold() -> None:
        async with made.open(spec):
            await asyncio.sleep(60)

    for wait_s in (0.05, 0.3, 1.0):
        task = asyncio.create_task(hold())
        await asyncio.sleep(wait_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert marked(engine) == []
    await made.close()


async def test_an_unknown_runtime_is_the_engine_s_error(
    engine: str, home: Path, tmp_path: Path
) -> None:
    made = DockerBackend(DockerConfig(url=engine, runtime="no-such-runtime"))
    with pytest.raises(SandboxError, match="no-such-runtime"):
        async with made.open(spec_of(tmp_path, f"FROM {BASE}\n")):
            pass
    await made.close()


@pytest.mark.parametrize("kind", ["nothing", "another service"])
async def test_where_no_engine_answers_it_says_what_to_do(
    home: Path, tmp_path: Path, kind: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        url = f"tcp://127.0.0.1:{service.getsockname()[1]}"
        if kind == "nothing":
            service.close()
            url = f"unix://{tmp_path}/none.sock"
        else:
            service.setblocking(True)
            asyncio.get_running_loop().run_in_executor(None, lambda: service.accept()[0].close())
        made = DockerBackend(DockerConfig(url=url))
        with pytest.raises(SandboxUnavailableError, match="DOCKER_HOST"):
            async with made.open(spec_of(tmp_path, "FROM host\n")):
                pass
        await made.close()
