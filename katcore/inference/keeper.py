"""Runs a command that ends with whoever started it, and with all that it started itself.

`python keeper.py PARENT COMMAND...` leads a process group of its own. When the command ends, when the
process PARENT is gone, however it went, or on SIGTERM, it ends the whole group: gently first, then not. It is
run as a file, and needs nothing but the standard library.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

GRACE_S = 8.0
"""How long the group has to end by itself."""
_POLL_S = 0.2
_LEFT_OVER_S = 1.0
"""The same for what the command leaves behind when it is over."""


def main() -> None:
    """Run, watch, and end all in the end."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    told: list[int] = []
    # A handler, not SIG_IGN: the command would inherit that.
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None and not told and os.getppid() == parent:
        time.sleep(_POLL_S)
    if child.returncode is not None:
        sys.stderr.write(f"the server ended with code {child.returncode}\n")
        sys.stderr.flush()
    os.killpg(0, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)
    time.sleep(_LEFT_OVER_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
