"""Limits: what a sandbox uses up is its own loss alone."""

from dataclasses import replace

import psutil
import pytest

from katcore.errors import SandboxTimeoutError
from katcore.protocols import SandboxBackend
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox.base import Declared, needs, output, python, sh

_FORKS = """
import os, time
num = 0
try:
    while num < 200:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        num += 1
except OSError:
    pass
print(num)
"""

_BOMB = """
import os, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
"""

_BUSY = """
import os, resource, time
start = time.monotonic()
child = os.fork()
while time.monotonic() < start + 2:
    pass
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(sum(item.ru_utime + item.ru_stime for item in used) / (time.monotonic() - start))
"""


class Limits(Declared):
    """Memory, processes, disk and cores, as the spec says."""

    @needs("has_memory_limit")
    async def test_beyond_its_memory_a_command_is_killed_and_the_sandbox_lives(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(replace(spec, memory_mib=96)) as sandbox:
            assert (await python(sandbox, "x = bytearray(300 << 20)")).exit_code == 137
            assert (await python(sandbox, "print(len(bytearray(30 << 20)))")).exit_code == 0

    @needs("has_memory_limit")
    async def test_within_its_memory_a_command_runs(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(replace(spec, memory_mib=512)) as sandbox:
            assert (await python(sandbox, "x = bytearray(300 << 20)")).exit_code == 0

    @needs("has_process_limit")
    async def test_processes_beyond_the_limit_do_not_start(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(replace(spec, max_processes=24)) as sandbox:
            assert 5 < int((await python(sandbox, _FORKS)).stdout) <= 24

    @needs("has_process_limit")
    async def test_a_fork_bomb_stays_inside(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(replace(spec, max_processes=40)) as sandbox:
            before = len(psutil.pids())
            with pytest.raises(SandboxTimeoutError):
                await sandbox.exec(["python3", "-c", _BOMB], timeout_s=1)
            assert len(psutil.pids()) < before + 200
            assert await output(sandbox, "echo on") == "on"

    @needs("has_disk_limit")
    async def test_beyond_its_disk_there_is_no_space_left(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(replace(spec, disk_mib=8)) as sandbox:
            assert (await sh(sandbox, "head -c 20000000 /dev/zero > big")).exit_code != 0
            assert int(await output(sandbox, "stat -c %s big")) <= 8 << 20
            await output(sandbox, "rm big; echo x > small")

    @needs("has_disk_limit")
    async def test_all_files_together_are_held_to_its_disk(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(replace(spec, disk_mib=8)) as sandbox:
            command = "for i in 1 2 3 4 5; do head -c 3000000 /dev/zero > part$i || exit 1; done"
            assert (await sh(sandbox, command)).exit_code != 0

    @needs("has_disk_limit")
    async def test_writing_beyond_its_disk_says_so(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(replace(spec, disk_mib=8)) as sandbox:
            with pytest.raises(OSError, match=r"No space left|too large|quota exceeded"):
                await sandbox.write(f"{self.workdir}/big", bytes(16 << 20))
            await sandbox.write(f"{self.workdir}/big", b"small")
            assert await sandbox.read(f"{self.workdir}/big") == b"small"

    @needs("has_cpu_limit")
    async def test_all_its_processes_together_have_the_time_of_its_cores(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(replace(spec, cpus=0.5)) as sandbox:
            assert 0.1 < float((await python(sandbox, _BUSY)).stdout) < 0.75
