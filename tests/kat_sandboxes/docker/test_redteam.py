"""The docker backend against the known tricks, on a real engine."""

import pytest

from katcore.testing.redteam import RedTeam
from tests.kat_sandboxes.engine import BASE

pytestmark = [pytest.mark.docker, pytest.mark.slow]


class TestDocker(RedTeam):
    """On an image with git and without pytest. Its programs are each container's own, to spoil."""

    dockerfile = f"FROM {BASE}\n"
    has_pytest = False
    has_fixed_programs = False
    has_disk_limit = False
    has_live = True
