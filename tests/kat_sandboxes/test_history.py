"""Git repositories in an image: HEAD, what leads up to it and the working tree stay, and nothing else."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kat_sandboxes.local import LocalBackend
from katcore.errors import SandboxError
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import environment, output, python

pytestmark = pytest.mark.asyncio(loop_scope="module")

_FIX = "return a + b  # THE-FIX"
_SEARCH = r"""
import os, zlib
for folder, _, names in (item for top in ("/repo", "/srv", "/tree") for item in os.walk(top)):
    for name in names:
        data = open(os.path.join(folder, name), "rb").read()
        for start in [place for place in range(len(data)) if data[place] == 0x78]:
            try:
                data += zlib.decompressobj().decompress(data[start:])
            except zlib.error:
                pass
        if b"THE-" + b"FIX" in data:
            print(os.path.join(folder, name))
"""
_HIDE = {
    "branch": "git branch later fix",
    "remote branch": "git update-ref refs/remotes/origin/main fix",
    "tag": "git tag v2 fix",
    "annotated tag": "git tag -a v2 -m 'with the fix' fix",
    "stash": "git checkout -q fix -- calc.py; git stash -q",
    "reflog": "git reset -q --hard fix; git reset -q --hard base",
    "unreachable": "git reset -q --hard fix; git reset -q --hard base; git reflog expire --expire=all --all",
    "packed refs": "git branch later fix; git pack-refs --all",
    "packed objects": "git branch later fix; git gc -q --prune=now; git branch -D later",
    "note": "git notes add -m 'it says THE-FIX'",
    "replacement": "git replace base fix",
    "worktree": "git worktree add -q ../tree fix; rm -r ../tree",
    "hook": "mkdir -p .git/hooks; echo 'echo THE-FIX' > .git/hooks/post-commit",
    "fetch head": "git fetch -q . fix",
    "original head": "git reset -q --hard fix; git reset -q --hard base; git update-ref ORIG_HEAD fix",
    "staged": "git checkout -q fix -- calc.py; git show base:calc.py > calc.py",
    "merge": "git merge -q -s ours --no-commit fix; git checkout -q base -- calc.py",
    "patch in config": "git config branch.main.description 'THE-FIX'",
}


def git(folder: Path, command: str) -> str:
    """What a shell command prints in a repository."""
    env = {"HOME": str(folder), "PATH": "/usr/bin:/bin", "GIT_CONFIG_NOSYSTEM": "1"}
    env |= {
        f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    return subprocess.check_output(["bash", "-ec", command], cwd=folder, env=env, text=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit with a bug, and a later one with its repair, which nothing leads to."""
    folder = tmp_path / "environment" / "repo"
    folder.mkdir(parents=True)
    (folder / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    git(folder, "git init -q -b main; git add .; git commit -qm first; git tag -a v1 -m one")
    (folder / "other.py").write_text("x = 1\n")
    git(folder, "git add .; git commit -qm second")
    return folder


def with_fix(folder: Path, hide: str) -> None:
    """Commit the repair, be at the commit before it again, and hide it; ` base` and ` fix` are the two."""
    base = git(folder, "git rev-parse HEAD").strip()
    (folder / "calc.py").write_text(f"def add(a, b):\n    {_FIX}\n")
    git(folder, "git commit -qam 'repair add'")
    fix = git(folder, "git rev-parse HEAD").strip()
    git(
        folder,
        "git reset -q --hard HEAD~1; git reflog expire --expire=all --all; rm -f .git/ORIG_HEAD",
    )
    words = hide.replace(" fix", f" {fix}").replace(" base", f" {base}")
    git(folder, words)


def spec_of(repository: Path, *more: str) -> SandboxSpec:
    """A machine with the repository, after more lines of its Dockerfile."""
    lines = ["FROM host", *more, "COPY repo /repo", "WORKDIR /repo"]
    return SandboxSpec(environment(repository.parent, "\n".join(lines)))


@pytest.mark.parametrize("hide", _HIDE.values(), ids=_HIDE)
async def test_nothing_of_the_future_is_left(
    backend: LocalBackend, repository: Path, hide: str
) -> None:
    with_fix(repository, hide)
    log = git(repository, "git --no-replace-objects log --format='%H %s' HEAD")
    spec = spec_of(repository)
    async with backend.open(replace(spec, keeps_history=True)) as sandbox:
        assert await python(sandbox, _SEARCH), "it is found"
    async with backend.open(spec) as sandbox:
        assert await python(sandbox, _SEARCH) == ""
        assert await output(sandbox, "git log --all --format='%H %s'") == log.strip()
        assert await output(sandbox, "git describe --abbrev=0; git tag; git stash list") == "v1\nv1"
        assert await output(sandbox, "git branch -a") == "* main"
        assert await output(sandbox, "git fsck --full --unreachable --strict 2>&1") == ""
        assert "return a - b" in await output(sandbox, "cat calc.py; git status --porcelain >&2")
        assert (
            await output(sandbox, "ls -A .git")
            == "HEAD\nconfig\ndescription\nindex\ninfo\nobjects\nrefs"
        )


async def test_borrowed_objects_and_their_store_are_cut(
    backend: LocalBackend, repository: Path
) -> None:
    with_fix(repository, "git branch later fix")
    parent = repository.parent
    git(parent, "git clone -q --bare repo mirror.git; mkdir store; cp -r repo/.git/objects store")
    git(
        repository,
        "cd .git/objects; rm -r *; mkdir info; echo /srv/store/objects > info/alternates",
    )
    more = ("COPY mirror.git /srv/mirror.git", "COPY store /srv/store")
    async with backend.open(spec_of(repository, *more)) as sandbox:
        assert await python(sandbox, _SEARCH) == ""
        assert await output(sandbox, "git log --format=%s; ls -A /srv/store") == "second\nfirst"
        assert (
            await output(sandbox, "git -C /srv/mirror.git log --all --format=%s") == "second\nfirst"
        )


async def test_a_submodule_and_a_linked_worktree(backend: LocalBackend, repository: Path) -> None:
    git(
        repository,
        'git branch later; git -c protocol.file.allow=always submodule -q add "$PWD" sub',
    )
    git(repository, "git commit -qm third; git worktree add -q linked later")
    git(
        repository,
        "cd sub; echo THE-FIX > calc.py; git commit -qam fix; git reset -q --hard HEAD~1",
    )
    async with backend.open(spec_of(repository)) as sandbox:
        assert await python(sandbox, _SEARCH) == ""
        assert (
            await output(sandbox, "git -C sub log --format=%s; git submodule status | cut -c1")
            == "second\nfirst"
        )
        assert await output(sandbox, "ls -A linked .git") == (
            ".git:\nHEAD\nconfig\ndescription\nindex\ninfo\nmodules\nobjects\nrefs\n\nlinked:\ncalc.py\nother.py"
        )


async def test_a_detached_and_an_unborn_head(backend: LocalBackend, repository: Path) -> None:
    with_fix(repository, "git branch later fix; git checkout -q --detach; git branch -D main")
    async with backend.open(spec_of(repository)) as sandbox:
        assert await python(sandbox, _SEARCH) == ""
        assert await output(sandbox, "git log --topo-order --all --format=%s; git branch") == (
            "second\nfirst\n* (no branch)"
        )
    git(repository, "git checkout -q --orphan new")
    async with backend.open(spec_of(repository, "ENV again=1")) as sandbox:
        assert await python(sandbox, _SEARCH) == ""
        assert await output(sandbox, "git status --porcelain; git symbolic-ref HEAD") == (
            "?? calc.py\n?? other.py\nrefs/heads/new"
        )


async def test_an_agent_can_go_on_with_it(backend: LocalBackend, repository: Path) -> None:
    with_fix(repository, "git remote add origin https://example.org/x; git branch later fix")
    async with backend.open(spec_of(repository)) as sandbox:
        await output(
            sandbox, "echo y = 2 > other.py; git commit -qam mine; git gc -q; git stash list"
        )
        assert await output(sandbox, "git log --format=%s; git remote") == "mine\nsecond\nfirst"
        await output(
            sandbox, "git checkout -qb side; git reset -q --hard HEAD~2; git diff --exit-code v1"
        )


async def test_a_shallow_clone_stays_one(backend: LocalBackend, repository: Path) -> None:
    parent = repository.parent
    git(parent, "mv repo full; git clone -q --depth 1 file://$PWD/full repo")
    async with backend.open(spec_of(repository)) as sandbox:
        assert await output(sandbox, "git log --format=%s; git fsck --full 2>&1") == "second"


async def test_a_repository_that_a_run_step_made_is_cut(
    backend: LocalBackend, repository: Path
) -> None:
    commit = "git commit -q --allow-empty -m"
    run = f"RUN git init -q /srv/made; cd /srv/made; {commit} 1; {commit} 2; git reset -q --hard HEAD~1"
    async with backend.open(spec_of(repository, run)) as sandbox:
        assert await output(sandbox, "cd /srv/made; git log --all --format=%s; git reflog") == "1"


async def test_a_repository_that_cannot_be_read_is_no_sandbox(
    backend: LocalBackend, repository: Path
) -> None:
    (repository / ".git" / "refs" / "heads" / "main").write_text("1" * 40 + "\n")
    with pytest.raises(SandboxError, match="exited with"):
        async with backend.open(spec_of(repository)):
            pass
