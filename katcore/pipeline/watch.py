"""What a running pipeline looks like in a terminal."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from katcore.pipeline.plan import Plan
from katcore.pipeline.stage import finished, stage_path

_PLAIN_EVERY_S = 15.0
_SHOWN = ("reward", "pass_rate", "loss", "kl", "kl_old")


class Watch:
    """Shows the stages of a plan as they run; on a terminal live, elsewhere a line now and then."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan = plan
        self._console = console
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._started_s = time.time()
        self._plain_s = 0.0
        self._said: set[str] = set()

    def __enter__(self) -> "Watch":
        for name in self._plan.stages:
            done = finished(stage_path(self._plan, name))
            if done:
                self._said.add(name)
                self._console.print(f"[dim]{name}: unchanged, skipped ({done.path})[/]")
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def tick(self, running: Sequence[str] = ()) -> None:
        """Look again; call it often."""
        for name in self._plan.stages:
            if name not in self._said and (done := finished(stage_path(self._plan, name))):
                self._said.add(name)
                self._console.print(
                    f"{name}: done in {_clock(done.seconds)}{_numbers(done.metrics)}"
                )
        states = [state for name in self._plan.stages if (state := self._state(name))]
        if self._live:
            self._live.update(self._picture(states))
        elif time.time() - self._plain_s > _PLAIN_EVERY_S:
            self._plain_s = time.time()
            for state in states:
                self._console.print(_line(state))

    def _state(self, name: str) -> dict[str, Any] | None:
        path = stage_path(self._plan, name)
        with suppress(OSError, ValueError):
            state: dict[str, Any] = json.loads(Path(f"{path}.work/progress.json").read_bytes())
            if time.time() - state["updated_s"] < 120 and Path(f"/proc/{state['pid']}").exists():
                return state
        return None

    def _picture(self, states: Sequence[dict[str, Any]]) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for state in states:
            steps = state.get("steps")
            bar: RenderableType = (
                ProgressBar(steps, state["step"], width=24)
                if steps
                else Text(state.get("text", ""))
            )
            table.add_row(state["stage"], bar, _facts(state))
        head = f"{len(self._said)} of {len(self._plan.stages)} stages"
        return Group(Text(f"{head}, {_clock(time.time() - self._started_s)}"), table)


def _line(state: dict[str, Any]) -> str:
    steps = state.get("steps")
    what = f"{state['step']}/{steps}" if steps else state.get("text", "")
    return f"  {state['stage']} {what} {_facts(state)}"


def _facts(state: dict[str, Any]) -> str:
    left_s = state.get("left_s")
    left = f"{_clock(left_s)} left" if left_s else ""
    return f"{state.get('step', '')}{_numbers(state.get('metrics', {}))} {left}"


def _numbers(metrics: dict[str, float]) -> str:
    shown = {key: value for key, value in metrics.items() if key.split("/")[0] in _SHOWN}
    return "".join(f", {key} {value:.3f}" for key, value in shown.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
