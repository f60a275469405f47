"""From a call log to the token tree, in a process of its own, so that its peak of memory is its own."""

import asyncio
import itertools
import resource
import time
from pathlib import Path
from typing import Any

import psutil

from katcore.bench.process import serve_lines
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Verdict
from katcore.trajectory.calls import calls_by_session
from katcore.trajectory.formats import tree_sample
from katcore.trajectory.tree import build_trajectory

_MIB = 1 << 20


async def measure(question: dict[str, Any]) -> object:
    """Seconds of each step, what came out, and how much memory that took at its peak."""
    before = psutil.Process().memory_info().rss
    times_s = [time.perf_counter()]
    ((session_id, calls),) = calls_by_session(Path(question["log"])).items()
    times_s.append(time.perf_counter())
    trajectory = build_trajectory(session_id, calls)
    times_s.append(time.perf_counter())
    sample = tree_sample(_rollout(trajectory))
    times_s.append(time.perf_counter())
    assert sample
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    read_s, build_s, tree_s = (b - a for a, b in itertools.pairwise(times_s))
    roles = [turn.role for turn in trajectory.turns]
    return {
        "read_s": read_s,
        "build_s": build_s,
        "tree_s": tree_s,
        "turns": len(roles),
        "tokens": sum(len(turn.prompt_ids) + len(turn.ids) for turn in trajectory.turns),
        "tree_tokens": len(sample.tokens),
        "roles": {role: roles.count(role) for role in sorted(set(roles))},
        "peak_mib": (peak - before) / _MIB,
    }


def _rollout(trajectory: Trajectory) -> Rollout:
    return Rollout("r", "t", "d", "g", 0, Outcome.SCORED, trajectory, Verdict(1.0))


if __name__ == "__main__":
    asyncio.run(serve_lines(measure))
