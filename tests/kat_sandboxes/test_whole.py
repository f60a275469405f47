"""An image that brings its own programs: they run in it, and those of the machine are not there."""

import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from kat_sandboxes.local import LocalBackend
from katcore.protocols import SupportsChanges
from katcore.sandbox.image import ImageStore
from katcore.sandbox.imported import import_image
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import environment, output

pytestmark = pytest.mark.asyncio(loop_scope="module")
_PROGRAMS = ("sh", "cat", "mkdir", "env")


@pytest.fixture(scope="module")
def name(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few programs of this machine and the libraries that they need, as a root file system."""
    path = tmp_path_factory.mktemp("whole") / "root.tar"
    with tarfile.open(path, "w", dereference=True) as tar:
        needed: set[str] = set()
        for program in _PROGRAMS:
            where = subprocess.check_output(
                ["sh", "-c", f"command -v {program}"], text=True
            ).strip()
            tar.add(where, f"bin/{program}")
            listed = subprocess.run(
                ["ldd", where], capture_output=True, text=True, check=False
            ).stdout
            needed |= set(re.findall(r"(/\S+) \(0x", listed))
        for library in needed:
            tar.add(library, library.lstrip("/"))
    return import_image(ImageStore(images), path, "tiny")


async def test_its_own_programs_run_and_no_others(
    backend: LocalBackend, name: str, tmp_path: Path
) -> None:
    folder = environment(tmp_path / "e", f"FROM {name}\nWORKDIR /w\nRUN echo built > made\n")
    async with backend.open(SandboxSpec(folder)) as sandbox:
        assert (await sandbox.exec(["sh", "-c", "cat made; pwd"])).stdout == b"built\n/w\n"
        for program in ("ls", "python3", "bash", "git"):
            assert (await sandbox.exec([program])).exit_code == 127
        found = await sandbox.exec(["sh", "-c", "echo /* /usr/* /opt/kat/*; : > /dev/null"])
        names = found.stdout.decode().split()
        assert {"/bin", "/proc", "/dev", "/tmp", "/w"} <= set(names)
        assert not {"/usr/bin", "/opt/kat/bin"} & set(names)
        assert (await sandbox.exec(["cat", "/proc/self/status"])).stdout.count(
            b"CapEff:\t0000000000000000"
        ) == 1


async def test_changes_are_carried_over(backend: LocalBackend, name: str, tmp_path: Path) -> None:
    spec = SandboxSpec(environment(tmp_path / "e", f"FROM {name}\nWORKDIR /w\n"))
    async with backend.open(spec) as one, backend.open(spec) as two:
        assert isinstance(one, SupportsChanges)
        assert isinstance(two, SupportsChanges)
        await one.exec(["sh", "-c", "mkdir d; echo x > d/f"])
        await two.apply(await one.changes())
        assert await two.read("/w/d/f") == b"x\n"


async def test_beside_it_images_on_the_machine_s_programs_are_as_they_were(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    async with backend.open(plain) as sandbox:
        assert await output(sandbox, "python3 -c 'print(1)'; command -v ls") == "1\n/usr/bin/ls"
