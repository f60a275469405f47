r"""What agents do to be rewarded without doing the task, as a class of attempts to inherit.

    class TestMyBackend(RedTeam):
        dockerfile = "FROM debian:12\nRUN apt-get update && apt-get install -y git python3\nWORKDIR /work\n"
        has_pytest = False

It wants the fixture `backend` of `SandboxContract`. Every trick is attempted in a real rollout of a real task
and its grading. It has to end in a reward of 0 without the agent having seen what it may not, or flagged. And
every trick is real: where it can be, it is shown to work on a task that is set and judged the naive way.
"""

from katcore.testing.redteam.suite import RedTeam
from katcore.testing.redteam.trick import Trick
from katcore.testing.redteam.tricks import TRICKS

__all__ = ["TRICKS", "RedTeam", "Trick"]
