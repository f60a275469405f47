"""Stage `distill`: fuse the experts into the student, on the student's own rollouts.

Each task's teacher is the expert of its domain, or the one that did best on like tasks; what the student
says is scored by the teacher's distribution (`katcore.train.distill`). It may begin off policy, on the
teachers' own last rollouts: with the whole vocabulary in the loss they need no other objective. Rewards are
recorded; they are trained on only where the settings say so.
"""

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from katcore.config import DistillSettings, is_first_process, learning_rate
from katcore.errors import StageError
from katcore.inference.chat import ChatTokenizer
from katcore.pipeline.engines import open_engines
from katcore.pipeline.lineage import ancestors
from katcore.pipeline.rollouts import (
    Rollouts,
    StepRollouts,
    facts_of,
    mixed,
    open_rollouts,
    samples_of,
    tasks_of,
)
from katcore.pipeline.route import best_teachers
from katcore.pipeline.stage import Job
from katcore.pipeline.stream import Make, Stream
from katcore.protocols import Engine
from katcore.rollout.single import Attempt
from katcore.schema.call import Sampling
from katcore.schema.codec import read_lines
from katcore.schema.expert import Expert
from katcore.schema.rollout import Rollout
from katcore.schema.sample import Sample
from katcore.schema.task import Task
from katcore.train.advantage import Advantages, group_advantages
from katcore.train.batch import turns
from katcore.train.distill import Distillation, Divergence, Overlap, Teachers, domain_scale
from katcore.train.policy import limit_threads
from katcore.train.prepare import load_frozen, load_trainable
from katcore.train.sft import draw
from katcore.train.trainer import Schedule, Trainer, engine_options


@dataclass(frozen=True, slots=True)
class Domain:
    """One part of the mixture: its tasks and its expert's model.

    `settings` has its share. `late` are rollouts of the model, to begin with; `measured` are files of those
    that it was evaluated by.
    """

    expert: Expert
    tasks: Sequence[Task]
    model: Path
    settings: DistillSettings
    late: Path | None = None
    measured: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """The expert's."""
        return self.expert.name


def run(job: Job) -> dict[str, float]:
    """Write `model/`, `rollouts.jsonl` and `calls.jsonl`."""
    limit_threads(job.preset.shared_threads)
    names = [name.removesuffix(".rl") for name in job.inputs if name.endswith(".rl")]
    return train(job, job.input("unified.sft") / "model", [_domain(job, name) for name in names])


def _domain(job: Job, name: str) -> Domain:
    expert = job.plugins.experts()[name]
    measured: tuple[Path, ...] = ()
    if f"{name}.evaluate" in job.inputs:
        measured = tuple(sorted(job.input(f"{name}.evaluate").glob("rl.*.jsonl")))
    return Domain(
        expert,
        tasks_of(job, expert, "train"),
        job.input(f"{name}.rl") / "model",
        job.preset.for_expert(name).distill,
        job.input(f"{name}.rl") / "rollouts.jsonl",
        measured,
    )


def train(job: Job, start: Path, domains: Sequence[Domain]) -> dict[str, float]:
    """Train the model of a folder on `domains`; see `run`."""
    settings = job.preset.distill
    chat = ChatTokenizer(start)
    for domain in domains:
        check_teacher(start, chat, domain)
    if is_first_process():  # origins are told by all weights, which take long to read
        _warn_of_strangers(job, start, domains)
    model = load_trainable(start, job.preset, job.seed)
    updates = settings.cold_steps + settings.steps * settings.epochs
    lr = learning_rate(settings, job.preset.lora)
    schedule = Schedule(lr, updates, settings.warmup, settings.final_lr)
    trainer = Trainer(model, schedule, **engine_options(job.preset))
    loop = _Loop(job, trainer, chat, domains)
    history = loop.load()
    loop.learn_from_teachers()
    asyncio.run(loop.run(start, history))
    trainer.publish(job.out, tokenizer=start)
    return {"kl_first": history[0], "kl_last": history[-1]} if history else {}


def check_teacher(start: Path, chat: ChatTokenizer, domain: Domain) -> None:
    """Whether a domain's teacher reads as the student does.

    Raises:
        StageError: it cannot score the student's ids.
    """
    found = chat.differences(ChatTokenizer(domain.model))
    if found:
        raise StageError(
            f"{domain.name}: the teacher {domain.model} differs from the student {start} in its"
            f" {', '.join(found)}; a teacher scores the student's very ids, so both need one tokenizer and"
            " one chat template"
        )


def _warn_of_strangers(job: Job, start: Path, domains: Sequence[Domain]) -> None:
    """A teacher of foreign origin is far away, and entropy may collapse (arXiv 2606.30406)."""
    for domain in domains:
        if not ancestors(start) & ancestors(domain.model):
            job.progress.warn(
                f"{domain.name}: the teacher {domain.model} and the student {start} are not known to come"
                " from one model; watch kl and entropy, or begin both with the same fine-tuned model"
            )


class _Loop:
    def __init__(
        self, job: Job, trainer: Trainer, chat: ChatTokenizer, domains: Sequence[Domain]
    ) -> None:
        self._job = job
        self._trainer = trainer
        self._chat = chat
        self._domains = domains
        self._settings = job.preset.distill
        self._shape = _shape(self._settings)
        chosen: Mapping[tuple[str, str], str] = {}
        if self._settings.teacher == "best":
            chosen = best_teachers(
                {domain.name: domain.tasks for domain in domains},
                {domain.name: _measured(domain) for domain in domains},
            )
        self._teachers = Teachers(
            {domain.name: _teacher(job, domain, trainer.model) for domain in domains}, chosen
        )

    def load(self) -> list[float]:
        """Go on from the last checkpoint: the mean KL of each on-policy step so far."""
        return list(self._trainer.load(self._job.checkpoint).get("history", []))

    def learn_from_teachers(self) -> None:
        """The off-policy beginning, on what the teachers said."""
        settings, job = self._settings, self._job
        if self._trainer.step_number >= settings.cold_steps:
            return
        pools = [_late_samples(job, domain) for domain in self._domains]
        shape = self._cold_shape()
        while (step := self._trainer.step_number) < settings.cold_steps:
            rows = [
                pool[at]
                for domain, pool in zip(self._domains, pools, strict=True)
                for at in draw(len(pool), domain.settings.cold_batch, job.seed + 31, step)
            ]
            metrics = self._update(rows, self._objective(rows, shape))
            job.progress.step(step, settings.cold_steps + settings.steps, metrics)
            if (step + 1) % settings.checkpoint_every == 0:
                self._trainer.save(job.checkpoint, history=[])

    def _cold_shape(self) -> Divergence:
        if self._settings.cold_objective == "likelihood":
            return replace(self._shape, kind="likelihood")
        return self._shape if self._shape.kind != "policy-gradient" else Divergence()

    async def run(self, start: Path, history: list[float]) -> None:
        """The steps on policy, on rollouts; `history` grows by the mean KL of each."""
        settings, job = self._settings, self._job
        made = StepRollouts(job.out / "rollouts.jsonl", "distill", len(history))
        async with AsyncExitStack() as stack:
            engines, make = None, None
            if is_first_process():  # which makes the rollouts that all learn from
                rollouts = await stack.enter_async_context(open_rollouts(job))
                engines = await stack.enter_async_context(
                    open_engines(job, self._trainer.model, start)
                )
                make = self._maker(rollouts, engines.engine, made)
            stream = Stream(
                make, settings.steps, engines, job.preset.serve.staleness, self._trainer.weights
            )
            await stack.enter_async_context(stream)
            for step in range(len(history), settings.steps):
                await self._step(stream, step, history)
                made.forget(step)
        made.close()

    def _maker(self, rollouts: Rollouts, engine: Engine, made: StepRollouts) -> Make:
        sampling = Sampling(self._settings.temperature, self._job.preset.max_new_tokens)
        parts = [rollouts.parts(domain.expert, sampling) for domain in self._domains]

        def make(step: int) -> Coroutine[Any, Any, list[Rollout]]:
            label = made.label(step)
            work = [
                [(attempt, own) for attempt in self._attempts(engine, domain, label, step)]
                for domain, own in zip(self._domains, parts, strict=True)
            ]
            # Of all domains at once: while one waits for its sandboxes, another has the engine answer.
            return made.make(rollouts, mixed(work), step)

        return make

    async def _step(self, stream: Stream, step: int, history: list[float]) -> None:
        settings, job = self._settings, self._job
        whole, metrics = await stream.of(step)
        metrics |= await stream.run(self._learn, whole)
        metrics |= stream.shares()
        history.append(metrics["kl"])
        done, total = settings.cold_steps + step, settings.cold_steps + settings.steps
        await stream.aside(job.progress.step, done, total, metrics)
        if (step + 1) % settings.checkpoint_every == 0:
            await stream.aside(partial(self._trainer.save, job.checkpoint, history=history))

    def _attempts(self, engine: Engine, domain: Domain, label: str, step: int) -> Iterator[Attempt]:
        num, seed = domain.settings.prompts, self._job.seed + 29
        for at in draw(len(domain.tasks), num, seed, step):
            for number in range(self._settings.group):
                yield Attempt(domain.tasks[at], engine, number, label)

    def _learn(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        samples: list[Sample] = []
        for domain in self._domains:
            own = [rollout for rollout in rollouts if rollout.domain == domain.name]
            samples += samples_of(self._job, domain.expert, own)
            if "reward" in (facts := facts_of(own)):
                metrics[f"reward/{domain.name}"] = facts["reward"]
        if not samples:
            raise StageError("no rollout of this step was scored; rollouts.jsonl has their errors")
        objective = self._objective(samples, self._shape)
        updates = [self._update(samples, objective) for _ in range(self._settings.epochs)]
        clipped = {name: updates[-1][name] for name in ("clip_rate",) if name in updates[-1]}
        skipped = {"skipped": sum(update["skipped"] for update in updates)}
        return metrics | updates[0] | clipped | skipped

    def _objective(self, samples: Sequence[Sample], shape: Divergence) -> Distillation:
        scale = None
        if self._settings.mean == "domain":
            scale = domain_scale(samples, self._job.preset.weighting)
        return Distillation(
            self._teachers,
            shape,
            advantages=self._advantages(samples) if self._settings.rewards else None,
            scale=scale,
            calls={sample.rollout_id: _in_calls(sample, self._chat) for sample in samples},
        )

    def _advantages(self, samples: Sequence[Sample]) -> Advantages:
        found: Advantages = {}
        for domain in self._domains:
            found |= group_advantages([one for one in samples if one.domain == domain.name])
        return found

    def _update(self, samples: Sequence[Sample], objective: Distillation) -> dict[str, float]:
        update = self._trainer.update(samples, objective, by=self._kind)
        return update | objective.seen()

    def _kind(self, sample: Sample) -> str:
        """What may share a batch: one domain, one teacher."""
        return f"{sample.domain} {self._teachers.name(sample)}"


def _shape(settings: DistillSettings) -> Divergence:
    overlap = None
    if settings.overlap_k:
        overlap = Overlap(
            settings.overlap_k,
            settings.overlap_power,
            settings.truncate_after,
            settings.truncate_below,
        )
    return Divergence(
        settings.objective,
        settings.top_k,
        settings.support,
        settings.strength,
        settings.difference_clip,
        settings.clip_low,
        settings.clip_high,
        settings.temperature,
        overlap,
    )


def _teacher(job: Job, domain: Domain, student: Any) -> Any:
    """The model of a domain's teacher. Some families pad their vocabularies to different sizes."""
    model = load_frozen(domain.model, job.preset, beside=student)
    sizes = (model.config.vocab_size, student.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise StageError(
            f"{domain.name}: the teacher {domain.model} has logits for {sizes[0]} tokens and the student for"
            f" {sizes[1]}; resize the embeddings of one of them"
        )
    return model


def _measured(domain: Domain) -> list[Rollout]:
    """What the teacher was evaluated by; tasks that name no domain are of its own."""
    return [
        replace(item, domain=item.domain or domain.name)
        for path in domain.measured
        for item in read_lines(Rollout, path)
    ]


def _late_samples(job: Job, domain: Domain) -> list[Sample]:
    """Samples of the second half of the rollouts that made the teacher.

    Those that failed too: what the teacher does when a try did not help is half of what it can do.
    """
    rollouts = list(read_lines(Rollout, domain.late)) if domain.late else []
    late = [replace(item, domain=domain.name) for item in rollouts[len(rollouts) // 2 :]]
    samples = samples_of(job, domain.expert, late)
    if not samples:
        raise StageError(
            f"{domain.name}: its teacher left no scored rollout to begin with; set cold_steps: 0"
        )
    return samples


def _in_calls(sample: Sample, chat: ChatTokenizer) -> list[bool]:
    """Which trained tokens are inside tool calls, as the tokenizer reads them."""
    answers: dict[int, list[int]] = {}
    trained = (token for token, yes in zip(sample.tokens, sample.trained, strict=True) if yes)
    for turn, token in zip(turns(sample), trained, strict=True):
        answers.setdefault(turn, []).append(token)
    return [mark for ids in answers.values() for mark in chat.in_calls(ids)]
