r"""What every sandbox backend has to do, as a class of checks to inherit.

    import pytest_asyncio
    from katcore.testing.sandbox import SandboxContract

    @pytest_asyncio.fixture(scope="module", loop_scope="module")
    async def backend():
        made = MyBackend(MyConfig())
        yield made
        await made.close()

    class TestMyBackend(SandboxContract):
        dockerfile = "FROM debian:12\nWORKDIR /work\n"
        has_door = False

The checks know the Protocols only. What a backend does not offer it declares, as above; the checks of it are
then reported as skipped, with that reason. A declaration that is not true fails.
"""

import pytest

from katcore.testing.sandbox.changes import Changes
from katcore.testing.sandbox.commands import Commands
from katcore.testing.sandbox.door import Door
from katcore.testing.sandbox.files import Files
from katcore.testing.sandbox.isolation import Isolation
from katcore.testing.sandbox.lease import Lease
from katcore.testing.sandbox.limits import Limits
from katcore.testing.sandbox.live import Live
from katcore.testing.sandbox.snapshot import Snapshots
from katcore.testing.sandbox.timing import Timing

__all__ = ["SandboxContract"]


@pytest.mark.asyncio(loop_scope="module")
class SandboxContract(
    Commands, Timing, Files, Isolation, Limits, Changes, Door, Lease, Snapshots, Live
):
    """All checks. Wants a fixture `backend`, of module scope and in the module's event loop."""
