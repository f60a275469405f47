"""The local backend against the known tricks."""

import os

from katcore.testing.redteam import RedTeam


class TestLocal(RedTeam):
    """It offers everything; live grading to root alone."""

    has_live = os.geteuid() == 0
