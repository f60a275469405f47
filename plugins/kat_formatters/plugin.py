"""What tasks come from, how they are judged, and how rollouts become rows: the built-in ways."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import Dataset, Formatter, Verifier

if TYPE_CHECKING:
    from katcore.trajectory.origin import SftTreeConfig, SftTreeFormatter


@hookimpl
def katcore_datasets() -> Iterable[Offer[Any, Dataset]]:
    """Task directories in Harbor's format."""
    from katcore.dataset.harbor import HarborConfig, HarborDataset

    yield Offer("harbor", HarborConfig, HarborDataset, "a folder of Harbor task directories")


@hookimpl
def katcore_verifiers() -> Iterable[Offer[Any, Verifier]]:
    """The task's own test script."""
    from katcore.verifier.state import TestScriptConfig, TestScriptVerifier

    summary = "tests/test.sh judges the final state in a fresh sandbox"
    yield Offer("test-script", TestScriptConfig, TestScriptVerifier, summary)


@hookimpl
def katcore_formatters() -> Iterable[Offer[Any, Formatter[Any]]]:
    """Token trees for the stages; rows for other trainers, viewers and tools."""
    from katcore.trajectory import atif, chat, formats, origin, rows

    summary = "one token tree per scored rollout"
    yield Offer("tree", formats.TreeConfig, formats.TreeFormatter, summary)
    summary = "token trees of any answers; makes ids for text, given a tokenizer"
    yield Offer("sft_tree", origin.SftTreeConfig, make_sft_tree, summary)
    summary = "token trees of sampled answers only, for reinforcement"
    yield Offer("rl_tree", origin.RlTreeConfig, origin.RlTreeFormatter, summary)
    summary = "token trees of sampled answers only, for a teacher to judge"
    yield Offer("distill_tree", origin.DistillTreeConfig, origin.DistillTreeFormatter, summary)
    summary = "token rows per path: ids, log-probabilities, loss mask"
    yield Offer("rows", rows.RowsConfig, rows.RowsFormatter, summary)
    summary = "chat messages with tools, one row per leaf conversation"
    yield Offer("chat", chat.ChatConfig, chat.ChatFormatter, summary)
    summary = "Harbor's trajectory format, one document per rollout"
    yield Offer("atif", atif.AtifConfig, atif.AtifFormatter, summary)


def make_sft_tree(config: "SftTreeConfig") -> "SftTreeFormatter":
    """With the tokenizer of its model folder, where one is given; loads nothing else of the model."""
    from katcore.trajectory.origin import SftTreeFormatter

    if config.tokenizer is None:
        return SftTreeFormatter(config)
    from katcore.inference.chat import ChatTokenizer

    return SftTreeFormatter(config, ChatTokenizer(config.tokenizer))
