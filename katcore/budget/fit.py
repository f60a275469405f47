"""Whether a stage fits its GPUs, and the smallest changes after which all stages do."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

from katcore.budget.memory import (
    Need,
    cache_bytes,
    reserve,
    rollout_parts,
    update_parts,
    utilization,
)

_MOST_CHANGES = 4
_MOST_ANSWERS = 3


@dataclass(frozen=True, slots=True)
class Excess:
    """What does not fit: `over` bytes more than there are. `phase` is `update` or `rollouts`."""

    phase: str
    over: int
    largest: str


def excesses(need: Need, memory: int) -> Iterator[Excess]:
    """All that does not fit a card of so many bytes."""
    room = memory - reserve(memory)
    if found := _over("update", update_parts(need), room):
        yield found
    parts = rollout_parts(need)
    if need.serve is None or not parts:
        return
    if need.serve.engine != "vllm":
        if found := _over("rollouts", parts, room):
            yield found
        return
    share = int(utilization(need.serve) * memory)
    engine = {name: num for name, num in parts.items() if name.startswith("engine")}
    if found := _over("rollouts", engine, share):
        yield found
    if need.is_shared:
        trainer = {name: num for name, num in parts.items() if name not in engine}
        if found := _over("rollouts", trainer | {"engine's share": share}, room):
            yield found


def conversations_at_once(need: Need, memory: int) -> int:
    """How many of full length the cache of all vLLM servers together has room for."""
    parts = rollout_parts(need)
    if need.serve is None or need.serve.engine != "vllm" or not parts:
        return 0
    room = int(utilization(need.serve) * memory) - parts["engine: weights"] - parts["engine: room"]
    each = need.context * cache_bytes(need.shape, need.serve)
    return max(0, room // each) * need.serve.replicas


def _over(phase: str, parts: Mapping[str, int], room: int) -> Excess | None:
    over = sum(parts.values()) - room
    return Excess(phase, over, max(parts, key=parts.__getitem__)) if over > 0 else None


Change = Mapping[str, Any]
"""What differs in a preset, in sections."""
Asked = TypeVar("Asked")


def smallest_changes(
    changes: Iterable[Change],
    apply: Callable[[Change], Asked | None],
    fits: Callable[[Asked], bool],
) -> list[Change]:
    """Up to three of the smallest sets of changes that fit; `apply` is None where they contradict."""
    alone = list(changes)
    for num in range(1, _MOST_CHANGES + 1):
        found: list[Change] = []
        for chosen in combinations(alone, num):
            together = merged(chosen)
            if together is None:
                continue
            asked = apply(together)
            if asked is not None and fits(asked):
                found.append(together)
                if len(found) == _MOST_ANSWERS:
                    break
        if found:
            return found
    return []


def merged(changes: Iterable[Change]) -> Change | None:
    """Several as one; None if two say different things of the same setting."""
    found: dict[str, Any] = {}
    for change in changes:
        for section, values in change.items():
            if not isinstance(values, Mapping):
                if section in found:
                    return None
                found[section] = values
                continue
            own = found.setdefault(section, {})
            if own.keys() & values.keys():
                return None
            own.update(values)
    return found
