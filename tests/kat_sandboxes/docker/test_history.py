"""Git repositories in an image of an engine: HEAD, what leads up to it, and nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kat_sandboxes.docker.backend import DockerBackend
from katcore.errors import TaskError
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.engine import BASE
from tests.kat_sandboxes.machines import environment, output
from tests.kat_sandboxes.test_history import git

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

_LOG = "git -c safe.directory=/repo log --all --format=%s"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An environment with a repository that knows a commit after its HEAD."""
    repository = tmp_path / "environment" / "repo"
    repository.mkdir(parents=True)
    commit = "git commit -q --allow-empty -m"
    git(repository, f"git init -q -b main; echo 1 > file; git add .; {commit} first")
    git(repository, f"{commit} later; git branch later; git reset -q --hard HEAD~1")
    return repository.parent


def spec_of(folder: Path, *lines: str) -> SandboxSpec:
    return SandboxSpec(environment(folder, "\n".join([*lines, "WORKDIR /repo"])))


async def test_of_an_image_s_own_programs(backend: DockerBackend, folder: Path) -> None:
    spec = spec_of(
        folder, f"FROM {BASE}", "COPY --chown=1000 repo /repo", "USER agent", "ENV WORD=x"
    )
    async with backend.open(replace(spec, keeps_history=True)) as sandbox:
        assert await output(sandbox, _LOG) == "later\nfirst"
    for _ in range(2):
        async with backend.open(spec) as sandbox:
            assert await output(sandbox, f"{_LOG}; git status --porcelain; git branch") == (
                "first\n* main"
            )
            look = "id -un; echo $WORD; pwd; find . ! -user agent; cat file"
            assert await output(sandbox, look) == "agent\nx\n/repo\n1"
            await output(
                sandbox, "echo 2 > file; git -c user.name=a -c user.email=b commit -qam two"
            )


async def test_of_the_machine_s_programs(backend: DockerBackend, folder: Path) -> None:
    async with backend.open(spec_of(folder, "FROM host", "COPY repo /repo")) as sandbox:
        assert await output(sandbox, f"{_LOG}; ls .git/logs 2>/dev/null; cat file") == "first\n1"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("RUN rm /usr/bin/git", "(?s)/repo: .* bash and git in the image"),
        ("RUN rm /usr/bin/bash", "(?s)/repo: .* bash and git in the image"),
        ("RUN echo 1111111111111111111111111111111111111111 > /repo/.git/refs/heads/main", "exit code"),
        ("VOLUME /repo", "in the volume /repo"),
    ],
)  # fmt: skip
async def test_what_cannot_be_cut_is_no_sandbox(
    backend: DockerBackend, folder: Path, line: str, said: str
) -> None:
    spec = spec_of(folder, f"FROM {BASE}", "COPY repo /repo", line)
    with pytest.raises(TaskError, match=said):
        async with backend.open(spec):
            pass
    async with backend.open(replace(spec, keeps_history=True)) as sandbox:
        assert (await sandbox.exec(["cat", "/repo/file"])).stdout == b"1\n"


async def test_without_a_repository_nothing_is_asked_of_the_image(
    backend: DockerBackend, folder: Path
) -> None:
    shutil.rmtree(folder / "repo")
    spec = spec_of(folder, f"FROM {BASE}", "RUN rm /usr/bin/git /usr/bin/bash")
    async with backend.open(spec) as sandbox:
        assert (await sandbox.exec(["sh", "-c", "echo on"])).stdout == b"on\n"
