"""Snapshots: many start from one prepared state, and none of them changes it."""

from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from katcore.errors import SandboxError
from katcore.protocols import Sandbox, SandboxBackend, SupportsChanges, SupportsSnapshot
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox.base import Declared, needs, output

_PREPARE = (
    "echo 1 > kept; mkdir d; echo 2 > d/x; ln -s d l; chmod 751 kept; rm -f /etc/gitconfig;"
    " echo x > /tmp/passing"
)


class Snapshots(Declared):
    """`snapshot`, and sandboxes that start from one."""

    async def test_whether_there_are_snapshots_is_declared(self, sandbox: Sandbox) -> None:
        assert isinstance(sandbox, SupportsSnapshot) == self.has_snapshot

    @needs("has_snapshot")
    async def test_others_start_from_it_when_it_is_closed(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(spec) as first:
            await output(first, _PREPARE)
            snapshot = _of(first).snapshot()
            name = await snapshot.__aenter__()
        try:
            for _ in range(2):
                async with backend.open(replace(spec, snapshot=name)) as sandbox:
                    found = await output(
                        sandbox,
                        "cat kept l/x; stat -c %a kept; ls /tmp /etc/gitconfig 2>/dev/null; true",
                    )
                    assert found.split() == ["1", "2", "751", "/tmp:"]
                    await output(sandbox, "echo changed > kept; rm -r d")
        finally:
            await snapshot.__aexit__(None, None, None)

    @needs("has_snapshot", "has_changes")
    async def test_changes_are_those_since_the_snapshot(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(spec) as first:
            await output(first, _PREPARE)
            async with _of(first).snapshot() as name:
                prepared = replace(spec, snapshot=name)
                async with backend.open(prepared) as one, backend.open(prepared) as two:
                    await output(one, "rm kept; echo 3 > d/new")
                    assert isinstance(one, SupportsChanges)
                    assert isinstance(two, SupportsChanges)
                    await two.apply(await one.changes())
                    assert (await output(two, "ls . d")).split() == [
                        ".:",
                        "d",
                        "l",
                        "d:",
                        "new",
                        "x",
                    ]
                async with backend.open(spec) as other:
                    assert await output(other, "ls") == ""

    @needs("has_snapshot")
    async def test_one_of_a_snapshot_is_one_too(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with AsyncExitStack() as opened:
            sandbox = await opened.enter_async_context(backend.open(spec))
            for command in ("echo 1 > a; echo 1 > b", "echo 2 > a; rm b"):
                await output(sandbox, command)
                name = await opened.enter_async_context(_of(sandbox).snapshot())
                following = backend.open(replace(spec, snapshot=name))
                sandbox = await opened.enter_async_context(following)
            assert await output(sandbox, "cat a; ls") == "2\na"

    @needs("has_snapshot")
    async def test_what_comes_later_is_not_in_it(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(spec) as first, _of(first).snapshot() as name:
            await output(first, "echo late > late")
            async with backend.open(replace(spec, snapshot=name)) as sandbox:
                assert await output(sandbox, "ls") == ""

    @needs("has_snapshot")
    async def test_when_it_is_let_go_it_is_no_more(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(spec) as first:
            async with _of(first).snapshot() as name:
                pass
            with pytest.raises(SandboxError, match="snapshot"):
                await backend.open(replace(spec, snapshot=name)).__aenter__()


def _of(sandbox: Sandbox) -> SupportsSnapshot:
    assert isinstance(sandbox, SupportsSnapshot)
    return sandbox
