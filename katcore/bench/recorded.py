"""A token tree from an agent at work: its calls through the proxy's capture, and what is trained of them."""

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path

from katcore.bench.agent import SESSION, Agent, Every
from katcore.schema.rollout import Outcome, Rollout, Verdict
from katcore.schema.sample import Sample
from katcore.trajectory.formats import tree_sample
from katcore.trajectory.tree import build_trajectory

_BUSY = Every(again=4, cut=3, subagent=9)
"""More often than in a long session, so that a short one has forks, too."""


def recorded(num_calls: int, vocabulary: int) -> Sample:
    """The tree of a session of about so many calls; ids are folded into the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        agent = Agent(Path(folder) / "calls.jsonl", "chat-completions", 0, _BUSY)
        asyncio.run(agent.work(num_calls))
        agent.close()
    trajectory = build_trajectory(SESSION, agent.calls)
    rollout = Rollout("agent", "t", "d", "g", 0, Outcome.SCORED, trajectory, Verdict(1.0))
    sample = tree_sample(rollout)
    assert sample
    return replace(sample, tokens=tuple(token % vocabulary for token in sample.tokens))
