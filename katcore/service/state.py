"""What the supervisor says about itself, for those who wait for it.

Whether it lives is not read from here: it does as long as it holds its lock, which the kernel lets go of.
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import IO

from katcore.service.layout import Layout, write_private
from katcore.service.port import HOST

_RETRIES = 20
_RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class State:
    """One moment of the supervisor. `waiting_for` names services that are not well yet."""

    pid: int
    airflow_port: int
    mlflow_port: int
    is_ready: bool = False
    failed: str = ""
    waiting_for: tuple[str, ...] = ()
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def airflow_url(self) -> str:
        """Airflow's UI and API."""
        return f"http://{HOST}:{self.airflow_port}"

    @property
    def mlflow_url(self) -> str:
        """MLflow's UI and API."""
        return f"http://{HOST}:{self.mlflow_port}"


def write(layout: Layout, state: State) -> None:
    """Replace the state."""
    write_private(layout.state, json.dumps(asdict(state), indent=1) + "\n")


def read(layout: Layout) -> State | None:
    """The last state, of a living supervisor or a dead one."""
    try:
        content = json.loads(layout.state.read_text())
        return State(**{**content, "waiting_for": tuple(content["waiting_for"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def is_alive(layout: Layout) -> bool:
    """Whether a supervisor runs."""
    if not layout.lock.exists():
        return False
    with layout.lock.open("r+") as file:
        return not _take(file, fcntl.LOCK_SH)


@contextmanager
def alive(layout: Layout) -> Iterator[bool]:
    """Be the supervisor of this home; False if another one is."""
    with layout.lock.open("a+") as file:
        is_mine = _take(file, fcntl.LOCK_EX)
        for _ in range(_RETRIES):
            # Who only asks whether it is taken holds it for a moment.
            if not is_mine:
                time.sleep(_RETRY_S)
                is_mine = _take(file, fcntl.LOCK_EX)
        yield is_mine


@contextmanager
def starting(layout: Layout) -> Iterator[None]:
    """Start or stop the services, one at a time: others wait."""
    layout.services.mkdir(parents=True, exist_ok=True)
    with (layout.services / "start.lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _take(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
