"""Token trees per algorithm: which origins of answers each may be trained on.

Policy gradients and distillation weigh a token by the log-probability it was sampled with, so both take
nothing but sampled answers. Supervised training takes any ids, and can make them from text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from katcore.errors import StageError
from katcore.schema.call import Message, Tool
from katcore.schema.rollout import Rollout, Trajectory, Turn
from katcore.schema.sample import Sample
from katcore.trajectory.conversation import conversation, num_messages
from katcore.trajectory.formats import TreeConfig, TreeFormatter
from katcore.trajectory.prefix import num_common


class Encoder(Protocol):
    """Makes ids from text, as `katcore.inference.chat.ChatTokenizer` does."""

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        """Ids of `messages[start:]`, as `Engine.encode`."""

    def answer_ids(
        self, message: Message, tools: Sequence[Tool], history: Sequence[Message] = ()
    ) -> tuple[int, ...]:
        """Ids of an answer to `history`, its end-of-turn token included."""


class RlTreeConfig(TreeConfig):
    """Options of `rl_tree`: those of `tree`."""


class DistillTreeConfig(TreeConfig):
    """Options of `distill_tree`: those of `tree`."""


class SftTreeConfig(TreeConfig):
    """Options of `sft_tree`: those of `tree`, and a model folder that makes ids where a service gave none."""

    tokenizer: Path | None = None


class RlTreeFormatter:
    """Token trees of sampled answers only, for reinforcement."""

    def __init__(self, config: RlTreeConfig) -> None:
        self._config = config

    def samples(self, rollouts: Iterable[Rollout]) -> Iterator[Sample]:
        """See `Formatter.samples`."""
        return _sampled_trees("rl_tree", self._config, rollouts)


class DistillTreeFormatter:
    """Token trees of sampled answers only, for a teacher to judge."""

    def __init__(self, config: DistillTreeConfig) -> None:
        self._config = config

    def samples(self, rollouts: Iterable[Rollout]) -> Iterator[Sample]:
        """See `Formatter.samples`."""
        return _sampled_trees("distill_tree", self._config, rollouts)


class SftTreeFormatter:
    """Token trees of any answers; a rollout with answers that have no ids is tokenised whole, once."""

    def __init__(self, config: SftTreeConfig, encoder: Encoder | None = None) -> None:
        self._config = config
        self._encoder = encoder

    def samples(self, rollouts: Iterable[Rollout]) -> Iterator[Sample]:
        """See `Formatter.samples`."""
        return TreeFormatter(self._config).samples(map(self._with_ids, rollouts))

    def _with_ids(self, rollout: Rollout) -> Rollout:
        number = _first_other(rollout, self._config, ("sampled", "scripted", "tokenised"))
        if number is None:
            return rollout
        if self._encoder is None:
            raise StageError(
                f"rollout {rollout.id}: turn {number} is of origin 'api', so it has no ids; give sft_tree"
                " a `tokenizer` (a model folder) to make them, or take formatter 'chat'"
            )
        return replace(rollout, trajectory=tokenised(rollout.trajectory, self._encoder))


def tokenised(trajectory: Trajectory, encoder: Encoder) -> Trajectory:
    """The same turns with ids made from their text, at log-probability 0."""
    turns: list[Turn] = []
    whole: list[tuple[int, ...]] = []
    for number, turn in enumerate(trajectory.turns):
        tools = trajectory.tools(number)
        prompt = [said.message for said in conversation(trajectory, number)[:-1]]
        before = whole[turn.parent] if turn.parent >= 0 else ()
        if turn.parent >= 0 and num_messages(turns[turn.parent]) == turn.num_shared_messages:
            new = encoder.encode(prompt, tools=tools, start=turn.num_shared_messages)
            num_shared = len(before)
        else:
            ids = encoder.encode(prompt, tools=tools)
            num_shared = num_common(ids, before)
            new = ids[num_shared:]
        answer = encoder.answer_ids(turn.message, tools, prompt)
        whole.append((*before[:num_shared], *new, *answer))
        turns.append(
            replace(
                turn,
                num_shared=num_shared,
                prompt_ids=tuple(new),
                ids=answer,
                logprobs=(0.0,) * len(answer),
                origin="tokenised",
            )
        )
    return replace(trajectory, turns=tuple(turns))


def _sampled_trees(name: str, config: TreeConfig, rollouts: Iterable[Rollout]) -> Iterator[Sample]:
    for rollout in rollouts:
        number = _first_other(rollout, config, ("sampled",))
        if number is not None:
            origin = rollout.trajectory.turns[number].origin
            raise StageError(
                f"rollout {rollout.id}: turn {number} is of origin {origin!r}, and {name} takes only"
                " 'sampled' turns; leave the rollout out, or take formatter 'sft_tree'"
            )
        yield from TreeFormatter(config).samples([rollout])


def _first_other(rollout: Rollout, config: TreeConfig, origins: tuple[str, ...]) -> int | None:
    """The first turn of a trained role whose origin is none of these; unscored rollouts train nothing."""
    if rollout.reward is None:
        return None
    for number, turn in enumerate(rollout.trajectory.turns):
        if turn.role in config.roles and turn.origin not in origins:
            return number
    return None
