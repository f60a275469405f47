"""The SWE expert: bug repair in real Python packages."""

from collections.abc import Iterable
from typing import Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import Synthesizer
from katcore.schema.expert import Expert


@hookimpl
def katcore_synthesizers() -> Iterable[Offer[Any, Synthesizer]]:
    """Tasks from source distributions and their test suites."""
    from kat_swe.synthesizer import SweConfig, SweSynthesizer

    summary = "bugs in real packages, judged by the packages' own tests"
    yield Offer("swe", SweConfig, SweSynthesizer, summary)


@hookimpl
def katcore_experts() -> Iterable[Expert]:
    """The SWE domain."""
    yield Expert(
        name="swe",
        title="SWE",
        summary="bug repair in real Python packages, judged by their own tests",
        synthesizer="swe",
        dataset="harbor",
        scaffold="mini",
        verifier="test-script",
        scaffold_options={"max_turns": 8, "max_output_chars": 480},
        # What its tool says of an edit that is none, or was tried before.
        formatter_options={"failed": ["error:"]},
    )
