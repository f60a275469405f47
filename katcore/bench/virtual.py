"""An event loop whose clock jumps to the next timer: hours of waiting are over as soon as computed."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    """Never waits: the clock is set on by as long as it would have."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready at once.

        Raises:
            RuntimeError: it would wait for ever.
        """
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("all wait, and no timer is set: nothing can ever happen")
            self._jump(max(0.0, timeout))
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time begins at 0, and is the same in each run of the same program."""

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def _jump(self, seconds: float) -> None:
        self._now_s += seconds


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
