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


def audit_samples(samples: Iterable[Sample], calls: Mapping[str, list[ModelCall]]) -> Audit:
    """Compare each sample with the calls of its rollout (by session id).

    Every trained run of tokens must be one call's sampled ids with that call's log-probabilities, under
    that call's policy; and no call's answer may be trained twice.
    """
    problems: list[str] = []
    num_samples = num_tokens = 0
    for sample in samples:
        num_samples += 1
        answers = [
            (call.generation.ids, call.generation.logprobs)
            for call in calls.get(sample.rollout_id, [])
        ]
        for run in _trained_runs(sample):
            num_tokens += len(run)
            ids = tuple(sample.tokens[at] for at in run)
            logprobs = tuple(sample.logprobs[at] for at in run)
            try:
                answers.remove((ids, logprobs))
            except ValueError:
                problems.append(
                    f"{sample.rollout_id}: trained tokens {run[0]}..{run[-1]} are no recorded answer"
                )
    return Audit(num_samples, num_tokens, tuple(problems[:100]))


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
