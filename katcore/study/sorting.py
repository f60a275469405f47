"""A task that a rule verifies and that needs no sandbox: digits in, the same digits in order out."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from katcore.inference.bytes import byte_chat
from katcore.inference.chat import ChatTokenizer
from katcore.protocols import Engine
from katcore.schema.call import EngineRequest, Origin, Sampling
from katcore.schema.sample import Sample

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sorting:
    """Prompts of `digits` digits."""

    digits: int
    chat: ChatTokenizer

    def prompts(self, num: int, order: random.Random) -> list[Prompt]:
        """So many, drawn."""
        texts = ("".join(order.choices("0123456789", k=self.digits)) for _ in range(num))
        return [self.chat.text_ids(f"{text}>")[:-1] for text in texts]

    def answer(self, prompt: Prompt) -> tuple[int, ...]:
        """What is right: a byte's id is the larger, the larger the digit."""
        return (*sorted(prompt[:-1]), self.chat.end_id)

    def demonstration(self, prompt: Prompt) -> Sample:
        """The right answer, to be learnt."""
        ids = self.answer(prompt)
        return _sample(prompt, ids, (0.0,) * len(ids), "demonstration", 1.0, "scripted")

    async def attempt(
        self, engine: Engine, prompts: Sequence[Prompt], group: int, temperature: float
    ) -> list[Sample]:
        """So many attempts at each prompt, each 1 if it is right and 0 if not."""
        sampling = Sampling(temperature, self.digits + 2)

        async def one(number: int, prompt: Prompt, turn: int) -> Sample:
            name = f"{number}-{turn}"
            made = await engine.generate(EngineRequest(name, prompt, sampling))
            reward = float(made.ids == self.answer(prompt))
            return _sample(prompt, made.ids, made.logprobs, name, reward, "sampled")

        return await asyncio.gather(
            *(
                one(number, prompt, turn)
                for number, prompt in enumerate(prompts)
                for turn in range(group)
            )
        )


def sorting(digits: int) -> Sorting:
    """The task with so many digits, in ids of bytes."""
    return Sorting(digits, byte_chat())


def _sample(
    prompt: Prompt,
    ids: tuple[int, ...],
    logprobs: tuple[float, ...],
    name: str,
    reward: float,
    origin: Origin,
) -> Sample:
    num, given = len(prompt) + len(ids), len(prompt)
    return Sample(
        tokens=prompt + ids,
        parents=tuple(range(-1, num - 1)),
        trained=(False,) * given + (True,) * len(ids),
        logprobs=(0.0,) * given + logprobs,
        branches=(1,) * num,
        rollout_id=name,
        task_id=name.partition("-")[0],
        domain="sorting",
        reward=reward,
        origin=origin,
        policy_version="",
    )
