"""Who teaches a task: by what was measured, where enough was; else the domain's own expert."""

from pathlib import Path

from katcore.pipeline.route import best_teachers
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Verdict
from katcore.schema.task import SandboxSpec, Task


def task(name: str, group: str) -> Task:
    return Task(name, "swe", "", Path(), SandboxSpec(Path()), group)


def rollouts(
    passes: str, domain: str = "swe", group: str = "g", task_id: str = "held"
) -> list[Rollout]:
    """One for each letter: 1 passed, 0 failed, x lost."""
    return [
        Rollout(
            f"r{number}",
            task_id,
            domain,
            group,
            number,
            Outcome.SANDBOX_FAILED if letter == "x" else Outcome.SCORED,
            Trajectory("r", ()),
            Verdict(None if letter == "x" else float(letter)),
        )
        for number, letter in enumerate(passes)
    ]


TASKS = {"swe": [task("a", "g"), task("b", "h")]}


def best(**measured: list[Rollout]) -> list[str]:
    return list(best_teachers(TASKS, measured).values())


def test_without_measurements_the_domain_s_own_expert_teaches() -> None:
    assert best() == ["swe", "swe"]
    assert best(swe=[], shell=rollouts("11" * 8, domain="shell")) == ["swe", "swe"]


def test_the_best_on_the_domain_teaches_and_equals_change_nothing() -> None:
    no, half, yes = rollouts("0" * 8), rollouts("01" * 4), rollouts("1" * 8)
    assert best(swe=half, shell=yes) == ["shell", "shell"]
    assert best(swe=half, shell=half, web=no) == ["swe", "swe"]
    assert best(swe=no, web=yes, shell=yes) == ["shell", "shell"]


def test_what_was_lost_counts_nothing() -> None:
    assert best(swe=rollouts("1" * 8 + "xxx"), shell=rollouts("1" * 8 + "0")) == ["swe", "swe"]
    assert best(swe=rollouts("0" * 8), shell=rollouts("1" * 7 + "x")) == ["swe", "swe"]


def test_few_rollouts_beat_nobody_and_are_beaten_by_nobody() -> None:
    many = rollouts("0" * 199 + "1")
    assert best(swe=many, shell=rollouts("1")) == ["swe", "swe"]
    assert best(swe=many, shell=rollouts("1" * 7)) == ["swe", "swe"]
    assert best(swe=many, shell=rollouts("1" * 8)) == ["shell", "shell"]
    assert best(swe=rollouts("0" * 7), shell=rollouts("1" * 200)) == ["swe", "swe"]
    # Nor do they keep those who have enough from being compared on a group.
    own = rollouts("0" * 8) + rollouts("1" * 8, group="h")
    other = rollouts("1" * 8) + rollouts("0" * 8, group="h")
    assert best(swe=own, shell=other, web=rollouts("1")) == ["shell", "swe"]


def test_a_group_decides_where_all_have_enough_of_it() -> None:
    own = rollouts("0" * 8) + rollouts("1" * 8, group="h")
    other = rollouts("1" * 8) + rollouts("0" * 8, group="h")
    assert best(swe=own, shell=other) == ["shell", "swe"]
    few = rollouts("1" * 7) + rollouts("0" * 8, group="h")
    assert best(swe=own, shell=few) == ["swe", "swe"], "7 are too few; half of the domain passes"


def test_a_task_decides_where_all_have_enough_of_it() -> None:
    own = rollouts("1" * 20) + rollouts("0" * 8, task_id="a")
    other = rollouts("0" * 20) + rollouts("1" * 8, task_id="a")
    assert best(swe=own, shell=other) == ["shell", "swe"]
