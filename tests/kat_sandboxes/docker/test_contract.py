"""The docker backend does what every backend has to, on a real engine."""

import pytest

from katcore.testing.sandbox import SandboxContract
from tests.kat_sandboxes.engine import BASE

pytestmark = [pytest.mark.docker, pytest.mark.slow]


class TestDocker(SandboxContract):
    """It offers everything, but a limit of the disk: the engine's storage here cannot."""

    dockerfile = f"FROM {BASE}\nWORKDIR /work\n"
    has_disk_limit = False
    has_live = True
