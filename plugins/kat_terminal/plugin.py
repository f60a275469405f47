"""The Terminal expert: shell tasks on real files."""

from collections.abc import Iterable
from typing import Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import Synthesizer
from katcore.schema.expert import Expert


@hookimpl
def katcore_synthesizers() -> Iterable[Offer[Any, Synthesizer]]:
    """Tasks for coreutils, sed, grep, jq and git."""
    from kat_terminal.synthesizer import TerminalConfig, TerminalSynthesizer

    summary = "shell tasks on real files; half need reading first"
    yield Offer("terminal", TerminalConfig, TerminalSynthesizer, summary)


@hookimpl
def katcore_experts() -> Iterable[Expert]:
    """The Terminal domain."""
    yield Expert(
        name="terminal",
        title="Terminal",
        summary="shell tasks, judged by the final state of the files",
        synthesizer="terminal",
        dataset="harbor",
        scaffold="mini",
        verifier="test-script",
    )
