"""The local backend against the known tricks."""

from katcore.testing.redteam import RedTeam


class TestLocal(RedTeam):
    """It offers everything."""
