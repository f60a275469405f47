"""The backend's own life: it ends with its process, and refuses where nothing can be isolated."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kat_sandboxes import reap
from kat_sandboxes.local import LocalBackend, LocalConfig
from katcore.errors import SandboxError, SandboxGoneError
from katcore.sandbox.process import Process
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import environment, output, processes_with, wait_until

_CHILD = """
import asyncio, sys
from pathlib import Path
from kat_sandboxes import reap
from kat_sandboxes.local import LocalBackend, LocalConfig
from katcore.errors import SandboxUnavailableError
from katcore.schema.task import SandboxSpec

async def main():
    backend = LocalBackend(LocalConfig(images=Path(sys.argv[1])))
    try:
        async with backend.open(SandboxSpec(Path(sys.argv[2]))) as sandbox:
            result = await sandbox.exec(["bash", "-c", sys.argv[3]], timeout_s=100)
            print(result.stdout.decode())
    except SandboxUnavailableError as error:
        print("unavailable:", error)
    finally:
        await backend.close()

asyncio.run(main())
"""


def child(folder: Path, command: str, *prefix: str) -> "subprocess.Popen[str]":
    """A process with a backend that runs one command in a sandbox."""
    arguments = [str(folder / "images"), str(environment(folder / "environment")), command]
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", _CHILD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HOME": str(folder)},
    )


async def test_killed_with_9_it_takes_its_sandboxes_along(tmp_path: Path) -> None:
    process = child(tmp_path, "setsid sleep 70004 & python3 -c 'import time; time.sleep(70004)'")
    await wait_until(lambda: len(processes_with("70004")) >= 4, seconds=120)
    (server, *_) = (item for item in processes_with("zygote") if item.ppid() == process.pid)
    mark = server.cmdline()[-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    await wait_until(lambda: not processes_with("sleep 70004"))
    await wait_until(lambda: not [p for p in processes_with("70004") if p.pid != process.pid])
    reap.sweep(mark, tmp_path / "images")
    assert not list(reap._groups(mark))


async def test_closed_it_leaves_no_process(tmp_path: Path) -> None:
    backend = LocalBackend(LocalConfig(images=tmp_path / "images"))
    async with backend.open(SandboxSpec(environment(tmp_path / "environment"))) as sandbox:
        await output(sandbox, "true")
        assert backend._process
        pid = backend._process.pid
        assert psutil.pid_exists(pid)
    await backend.close()
    assert not psutil.pid_exists(pid)


async def test_when_what_they_are_forked_from_has_died_all_is_started_anew(tmp_path: Path) -> None:
    backend = LocalBackend(LocalConfig(images=tmp_path / "images"))
    spec = SandboxSpec(environment(tmp_path / "environment"))
    async with backend.open(spec) as sandbox:
        assert backend._process
        first = Process.parse(sandbox.handle()).pid
        children = psutil.Process(backend._process.pid).children()
        (template,) = (item for item in children if item.pid != first)
        template.kill()
        with pytest.raises(SandboxError):
            async with backend.open(spec):
                pass
        with pytest.raises(SandboxGoneError):  # it goes with the rest
            await sandbox.exec(["true"])
    await wait_until(lambda: backend._process is None or backend._process.poll() is not None)
    async with backend.open(spec) as sandbox:
        assert await output(sandbox, "echo again") == "again"
    await backend.close()
    assert not processes_with(backend.mark())


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user is what runs all other tests")
def test_an_ordinary_user_has_the_same_isolation() -> None:
    folder = Path(
        subprocess.check_output(["mktemp", "-d", "/var/tmp/kat-XXXXXX"], text=True).strip()
    )
    try:
        subprocess.run(["chmod", "777", folder], check=True)
        command = (
            "id -u; grep CapEff /proc/self/status; ls /proc/1/root/ 2>&1 | grep -c denied;"
            " unshare -m true || echo refused; echo x > f; cat f; python3 -c 'print(6 * 7)'"
        )
        prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        # Before it, it may be said that an ordinary user has no cgroups here.
        said = child(folder, command, *prefix).communicate(timeout=60)[0].split()[-7:]
        assert said == ["0", "CapEff:", "0" * 16, "1", "refused", "x", "42"]
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a right away from root")
def test_where_nothing_can_be_isolated_nothing_runs(tmp_path: Path) -> None:
    prefix = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    process = child(tmp_path, f"touch {tmp_path}/ran", *prefix)
    said = process.communicate(timeout=60)[0]
    assert said.startswith("unavailable: this machine cannot isolate sandboxes")
    assert "user namespaces" in said
    assert process.returncode == 0
    assert not (tmp_path / "ran").exists()
