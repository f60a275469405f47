"""Proof from the call log that training rows hold what was sampled, and nothing else. Fails closed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from katcore.schema.call import ModelCall
from katcore.schema.sample import Sample


@dataclass(frozen=True, slots=True)
class Audit:
    """What was checked, and every way in which it was wrong (at most the first hundred)."""

    num_samples: int
    num_trained_tokens: int
    problems: tuple[str, ...]


_Answer = tuple[int, tuple[int, ...], tuple[float, ...], str, str]
"""Hash of the prompt, ids, log-probabilities, policy and origin."""


def audit_samples(samples: Iterable[Sample], calls: Mapping[str, list[ModelCall]]) -> Audit:
    """Compare each sample with the calls of its rollout (by session id).

    Every trained run of tokens must be one call's sampled ids with that call's log-probabilities, after
    that call's prompt, under that call's policy; and no call's answer may be trained twice.
    """
    problems: list[str] = []
    num_samples = num_tokens = 0
    left: dict[str, list[_Answer]] = {}
    for sample in samples:
        num_samples += 1
        if sample.rollout_id not in left:
            left[sample.rollout_id] = _answers(calls.get(sample.rollout_id, []))
        beginnings = _beginnings(sample)
        for number, run in enumerate(_trained_runs(sample)):
            num_tokens += len(run)
            version = (sample.versions or (sample.policy_version,) * (number + 1))[number]
            try:
                left[sample.rollout_id].remove(_claimed(sample, beginnings, run, version))
            except ValueError:
                problems.append(
                    f"{sample.rollout_id}: trained tokens {run[0]}..{run[-1]} are no recorded answer"
                )
    return Audit(num_samples, num_tokens, tuple(problems[:100]))


def _answers(calls: list[ModelCall]) -> list[_Answer]:
    """What may be trained. A call whose parent was not recorded has no known prompt, so it may not."""
    known: dict[str, _Hashes] = {}
    answers: list[_Answer] = []
    for call in calls:
        parent = known.get(call.parent)
        if call.parent and (parent is None or call.num_shared > parent.num_ids):
            continue
        made = call.generation
        hashes = _Hashes(parent, call.num_shared, call.new_prompt_ids + made.ids)
        known[call.call_id] = hashes
        prompt = hashes.at(call.num_shared + len(call.new_prompt_ids))
        answers.append((prompt, made.ids, made.logprobs, made.policy_version, made.origin))
    return answers


class _Hashes:
    """The hash of each beginning of a call's conversation: some of the parent's, then its own."""

    def __init__(self, parent: "_Hashes | None", num_shared: int, ids: Iterable[int]) -> None:
        self._parent = parent
        self._num_shared = num_shared
        self._own = [parent.at(num_shared) if parent else _EMPTY]
        for number in ids:
            self._own.append(_longer(self._own[-1], number))

    @property
    def num_ids(self) -> int:
        return self._num_shared + len(self._own) - 1

    def at(self, num: int) -> int:
        node = self
        while num < node._num_shared and node._parent:
            node = node._parent
        return node._own[num - node._num_shared]


_EMPTY = 0


def _longer(beginning: int, number: int) -> int:
    return hash((beginning, number))


def _beginnings(sample: Sample) -> list[int]:
    """The hash of the path up to each token, the token included."""
    hashes: list[int] = []
    for token, parent in zip(sample.tokens, sample.parents, strict=True):
        hashes.append(_longer(hashes[parent] if parent >= 0 else _EMPTY, token))
    return hashes


def _claimed(sample: Sample, beginnings: list[int], run: list[int], version: str) -> _Answer:
    before = sample.parents[run[0]]
    ids = tuple(sample.tokens[at] for at in run)
    logprobs = tuple(sample.logprobs[at] for at in run)
    prompt = beginnings[before] if before >= 0 else _EMPTY
    return prompt, ids, logprobs, version, sample.origin


def _trained_runs(sample: Sample) -> list[list[int]]:
    runs: list[list[int]] = []
    for at, (is_trained, parent) in enumerate(zip(sample.trained, sample.parents, strict=True)):
        if not is_trained:
            continue
        if runs and runs[-1][-1] == parent == at - 1:
            runs[-1].append(at)
        else:
            runs.append([at])
    return runs
