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


_Answer = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], str, str]
"""Prompt, ids, log-probabilities, policy and origin."""


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
        for run in _trained_runs(sample):
            num_tokens += len(run)
            try:
                left[sample.rollout_id].remove(_claimed(sample, run))
            except ValueError:
                problems.append(
                    f"{sample.rollout_id}: trained tokens {run[0]}..{run[-1]} are no recorded answer"
                )
    return Audit(num_samples, num_tokens, tuple(problems[:100]))


def _answers(calls: list[ModelCall]) -> list[_Answer]:
    """What may be trained. A call whose parent was not recorded has no known prompt, so it may not."""
    conversations: dict[str, tuple[int, ...]] = {"": ()}
    answers: list[_Answer] = []
    for call in calls:
        if call.parent in conversations:
            prompt, made = conversations[call.parent] + call.new_prompt_ids, call.generation
            conversations[call.call_id] = prompt + made.ids
            answers.append((prompt, made.ids, made.logprobs, made.policy_version, made.origin))
    return answers


def _claimed(sample: Sample, run: list[int]) -> _Answer:
    path: list[int] = []
    at = sample.parents[run[0]]
    while at >= 0:
        path.append(sample.tokens[at])
        at = sample.parents[at]
    ids = tuple(sample.tokens[at] for at in run)
    logprobs = tuple(sample.logprobs[at] for at in run)
    return tuple(reversed(path)), ids, logprobs, sample.policy_version, sample.origin


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
