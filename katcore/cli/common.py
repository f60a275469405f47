"""What all verbs share: where they print, and how errors are said."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import typer
from rich.console import Console
from rich.markup import escape

from katcore.config import is_first_process
from katcore.errors import KatError, StageBusyError

out = Console()
err = Console(stderr=True)


@contextmanager
def errors_said() -> Iterator[None]:
    """Say an error of ours in one line, and exit: 2; 75 if another process is at it; 130 after Ctrl-C."""
    try:
        yield
    except KatError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(75 if isinstance(error, StageBusyError) else 2) from error
    except KeyboardInterrupt as stop:
        err.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from stop


@contextmanager
def own_output() -> Iterator[None]:
    """What libraries print on the way goes to standard error: standard output is for results."""
    with redirect_stdout(sys.stderr):
        yield


def say(line: str) -> None:
    """A line of progress; of several processes that train together, the first one's."""
    if is_first_process():
        err.print(line, highlight=False, markup=False, soft_wrap=True)
