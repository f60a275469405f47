"""Stage `collect`: demonstrations, replayed through sandbox, proxy and verifier like any agent's work.

Only what the verifier passes becomes training data; the call log proves where each token came from.
"""

import asyncio
import random
from collections.abc import Iterator

from katcore.dataset.harbor import demonstrations
from katcore.errors import StageError
from katcore.inference.chat import ChatTokenizer
from katcore.inference.scripted import ScriptedEngine
from katcore.pipeline.rollouts import RolloutFile, open_rollouts, samples_of, tasks_of
from katcore.pipeline.stage import Job
from katcore.rollout.single import Attempt
from katcore.schema.call import Sampling
from katcore.schema.codec import write_lines
from katcore.schema.rollout import Outcome
from katcore.schema.task import Task
from katcore.trajectory.audit import audit_samples
from katcore.trajectory.calls import calls_by_session


def run(job: Job) -> dict[str, float]:
    """Write `rollouts.jsonl`, `samples.jsonl` and `calls.jsonl`."""
    expert = job.plugins.experts()[job.spec.expert]
    file = RolloutFile(job.out / "rollouts.jsonl")
    asyncio.run(_replay(job, file))
    file.close()
    # Of a task whose rollout was lost and made again, the last one counts.
    by_task = {rollout.task_id: rollout for rollout in file.read()}
    rollouts = [by_task[name] for name in sorted(by_task)]
    passed = [rollout for rollout in rollouts if rollout.reward == 1.0]
    samples = samples_of(job, expert, passed)
    audit = audit_samples(samples, calls_by_session(job.out / "calls.jsonl"))
    if audit.problems:
        raise StageError(f"the call log does not bear out the samples: {audit.problems[0]}")
    write_lines(job.out / "samples.jsonl", samples)
    scored = sum(rollout.outcome is Outcome.SCORED for rollout in rollouts)
    return {
        "num_rollouts": float(len(rollouts)),
        "num_samples": float(len(samples)),
        "pass_rate": len(passed) / max(1, scored),
        "num_trained_tokens": float(audit.num_trained_tokens),
    }


async def _replay(job: Job, file: RolloutFile) -> None:
    expert = job.plugins.experts()[job.spec.expert]
    done = {rollout.task_id for rollout in file.read() if rollout.outcome is Outcome.SCORED}
    tasks = tasks_of(job, expert, "train")
    num_tasks = min(len(tasks), job.preset.collect.max_tasks)
    tasks = random.Random(f"{job.seed}/collect").sample(tasks, num_tasks)
    chat = ChatTokenizer(job.input("base") / "model")
    passed = 0
    async with open_rollouts(job) as rollouts:
        parts = rollouts.parts(expert, Sampling(max_tokens=1 << 20))
        attempts = (item for item in _attempts(tasks, chat, job.seed) if item.task.id not in done)
        num = len(done)
        async for rollout in rollouts.run(attempts, parts):
            file.append(rollout)
            passed += rollout.reward == 1.0
            job.progress.step(num, len(tasks), {"pass_rate": passed / (num - len(done) + 1)})
            num += 1


def _attempts(tasks: list[Task], chat: ChatTokenizer, seed: int) -> Iterator[Attempt]:
    """One demonstration per task, drawn among its ways."""
    for task in tasks:
        ways = demonstrations(task)
        if ways:
            way = random.Random(f"{seed}/{task.id}").choice(ways)
            yield Attempt(task, ScriptedEngine(chat, way.turns), label=f"demo-{way.style}")
