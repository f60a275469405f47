"""Rollouts that are made while earlier ones are learnt from, at most so many steps ahead.

A step's rollouts are begun as soon as the weights are `staleness` steps before its own, and a step waits for
all of its own: groups are whole, and no token is of weights more than so many versions old. Were a later
group learnt from before an earlier one, the earlier one would be too old when its turn comes: with as many
in the making as the bound allows, first come first learnt is the only order that keeps it.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Self

from katcore.pipeline.engines import Engines, Weights
from katcore.pipeline.rollouts import facts_of
from katcore.schema.rollout import Rollout
from katcore.train import ranks
from katcore.train.worker import new_worker

Make = Callable[[int], Coroutine[Any, Any, list[Rollout]]]
"""Makes all rollouts of a step that are not made yet, and returns all. Called as soon as they may begin."""


class Stream:
    """The rollouts of steps below `num_steps`, made by `engines`, and the trainer's turns between them.

    `weights` are the trainer's, when called. Of several processes that train together the first makes the
    rollouts; the others have no engines, and are told.
    """

    def __init__(
        self,
        make: Make | None,
        num_steps: int,
        engines: Engines | None,
        staleness: int,
        weights: Callable[[], Weights],
    ) -> None:
        self._weights = weights
        self._make = make
        self._num_steps = num_steps
        self._engines = engines
        self._ahead = staleness
        # Without staleness nothing goes on while the trainer computes, and it stays where it is.
        self._trainer = new_worker() if staleness and engines else None
        self._begun: dict[int, asyncio.Task[list[Rollout]]] = {}
        self._asked_s = self._given_s = 0.0

    async def of(self, step: int) -> tuple[list[Rollout], dict[str, float]]:
        """All rollouts of a step, and their facts; the trainer's weights go to the engines first.

        Those of the steps after it are begun, too.
        """
        before_s, self._asked_s = self._given_s, time.perf_counter()
        await self._renew(step)
        made = await self.aside(ranks.share, await self._made(step) if self._engines else [])
        self._given_s = time.perf_counter()
        since_s = before_s if self._ahead and before_s else self._asked_s
        facts: dict[str, float] = await self.aside(facts_of, made, self._given_s - since_s)
        return made, facts | staleness_of(made, step)

    async def _renew(self, step: int) -> None:
        weights = await self.aside(self._weights)  # which all processes may have to gather
        await self.aside(ranks.make_room)  # for engines that wake on the same GPUs
        if self._engines:
            await self._engines.hand_over(str(step), weights)

    async def _made(self, step: int) -> list[Rollout]:
        assert self._make
        for later in range(step, min(step + self._ahead + 1, self._num_steps)):
            if later not in self._begun:
                self._begun[later] = asyncio.create_task(self._make(later))
        return await self._begun.pop(step)

    async def run(self, call: Callable[..., Any], *given: Any) -> Any:
        """What `call` returns: the trainer computes, in its own thread if rollouts are made meanwhile."""
        if self._engines:
            await self._engines.make_room()
        return await self.aside(call, *given)

    async def aside(self, call: Callable[..., Any], *given: Any) -> Any:
        """What `call` returns, beside the rollouts that are being made meanwhile.

        Whatever takes long between steps goes here: agents that wait for an answer are out of time otherwise.
        """
        if self._trainer is None:
            return call(*given)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._trainer, partial(call, *given))

    def shares(self) -> dict[str, float]:
        """For which share of the step, which ends now, the trainer and the engines had nothing to do."""
        whole_s = time.perf_counter() - self._asked_s
        shares = {"trainer_idle": (self._given_s - self._asked_s) / whole_s}
        if self._engines:
            shares["engine_idle"] = self._engines.engine.idle_share()
        return shares

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop what is being made."""
        for task in self._begun.values():
            task.cancel()
        await asyncio.gather(*self._begun.values(), return_exceptions=True)
        if self._trainer is not None:
            await asyncio.to_thread(self._trainer.shutdown)


def staleness_of(rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
    """How many versions older than a step's weights those are that its tokens were sampled from.

    Of rollouts that were lost nothing is learnt, so they count nothing.
    """
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    turns = [turn for rollout in scored for turn in rollout.trajectory.turns]
    ages = [
        step - int(turn.policy_version)
        for turn in turns
        if turn.origin == "sampled"
        for _ in turn.ids
    ]
    return {
        "staleness_mean": statistics.fmean(ages) if ages else 0.0,
        "staleness_max": float(max(ages, default=0)),
    }
