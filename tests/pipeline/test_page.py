"""The pages of a made-up run: stage folders in, HTML out, nothing in it alive."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from katcore.pipeline import browse
from katcore.pipeline.browse import choose
from katcore.pipeline.chart import curve, escape
from katcore.pipeline.page import write_page
from katcore.schema.call import Message
from katcore.schema.codec import write_lines
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Turn, Verdict

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>\x1b[31m\u202e"
KEY = "0123456789abcdef"


def turn(parent: int, said: str, answer: str, role: Any = "main") -> Turn:
    messages = (Message("user", said),)
    shared = 0 if parent < 0 else 2
    return Turn(parent, shared, shared, (1,), (2,), (0.0,), messages, answer, "1", "sampled", role)


def rollout(task: str, reward: float | None, text: str = "ls") -> Rollout:
    turns = (turn(-1, f"Do {task}.", text), turn(0, f"out of {text}", "submit"))
    outcome = Outcome.SCORED if reward is not None else Outcome.SANDBOX_FAILED
    trajectory = Trajectory(task, turns)
    return Rollout(task, task, "d", "g", 0, outcome, trajectory, Verdict(reward), "submitted")


def stage(root: Path, stage_id: str, *inputs: str) -> Path:
    folder = root / stage_id / KEY
    folder.mkdir(parents=True)
    manifest = {
        "id": stage_id,
        "key": KEY,
        "spec": {"stage": stage_id.partition(".")[2] or stage_id},
        "inputs": dict.fromkeys(inputs, KEY),
        "packages": {"torch": "2", "missing": ""},
        "metrics": {},
        "started": 1_700_000_000.0,
        "seconds": 61.0,
        "cpu_seconds": 50.0,
        "max_rss_mib": 700,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def rate(value: float) -> dict[str, float]:
    return {"rate": value, "low": value / 2, "high": value, "n": 4}


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The gate's folder of a run of one expert; its trajectories are hostile."""
    root = tmp_path / "stages"
    sft = stage(root, "shell.sft")
    lines = [json.dumps({"step": step, "loss": 4.0 - step, "lr": 0.1}) for step in (0, 1, 2, 2)]
    (sft / "curve.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    evaluate = stage(root, "shell.evaluate", "shell.sft")
    unified = stage(root, "unified.evaluate", "shell.sft")
    for folder, column in (
        (evaluate, "base"),
        (evaluate, "sft"),
        (evaluate, "rl"),
        (unified, "unified"),
    ):
        rollouts = [rollout("t1", 1.0), rollout("t2", 0.0, ATTACK), rollout(f"t3{ATTACK}", None)]
        write_lines(folder / f"{column}.greedy.shell.jsonl", rollouts)
    gate = stage(root, "unified.gate", "unified.evaluate", "shell.evaluate")
    rates = {column: rate(0.5) for column in ("base", "sft", "rl", "unified")}
    check = {"domain": "shell", "what": "SFT - base", "value": 0.5, "low": 0.1, "high": 0.8}
    report = {
        "preset": ATTACK,
        "seed": 0,
        "domains": {"shell": {**rates, "sampled": rates}},
        "gate": {"held": False, "checks": [{**check, "wanted": "lower bound > 0", "held": True}]},
    }
    (gate / "report.json").write_text(json.dumps(report))
    return gate


class Page(HTMLParser):
    """The tags of a page, and whether they are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_index_names_what_happened(gate: Path, tmp_path: Path) -> None:
    index = write_page(gate, tmp_path / "report", {"kat-shell": "3"})
    text = index.read_text()
    assert index == tmp_path / "report" / "index.html"
    for said in ("shell.sft", "1:01", "700", "not held", "kat-shell v3", "torch 2", "SFT - base"):
        assert said in text, said
    assert text.count("<figure>") == 1, "the loss; not the learning rate"
    assert "<b>2.000</b>" in text, "the last complete step, once"


@pytest.mark.parametrize("has_reference", [True, False])
def test_each_stage_has_its_curves_in_one_order(
    gate: Path, tmp_path: Path, *, has_reference: bool
) -> None:
    """The distance to the old policy stands in for that to a reference, if there is none."""
    row = {"infra_failed_rate": 0.0, "entropy": 1.2, "clip_rate": 0.1, "kl_old": 0.01, "loss": -0.2}
    row |= {"tokens_per_s": 12345.6, "reward": 0.5} | ({"kl": 0.02} if has_reference else {})
    rl = stage(gate.parents[1], "shell.rl", "shell.sft")
    (rl / "curve.jsonl").write_text(
        "".join(json.dumps({"step": step, **row}) + "\n" for step in range(3))
    )
    manifest = json.loads((gate / "manifest.json").read_text())
    manifest["inputs"]["shell.rl"] = KEY
    (gate / "manifest.json").write_text(json.dumps(manifest))
    text = write_page(gate, tmp_path, {}).read_text()
    names = ["reward", "kl" if has_reference else "kl_old", "clip_rate", "entropy", "tokens_per_s"]
    titles = re.findall(r"<h3>([^<]+)|<figcaption>([^ ]+) ", text)
    assert ["".join(title) for title in titles] == [
        *("shell.sft", "loss", "shell.rl", *names, "infra_failed_rate"),
    ]
    assert "tokens_per_s <b>12,346</b>" in text


def test_all_columns_of_a_task_stand_side_by_side(gate: Path, tmp_path: Path) -> None:
    write_page(gate, tmp_path, {})
    text = (tmp_path / "rollouts-shell.html").read_text()
    assert text.count("<section>") == 3 * 4
    assert "Do t1." in text
    assert "out of ls" in text
    assert {
        word: text.count(f">{word}</span></h4>") for word in ("passed", "failed", "unscored")
    } == {
        "passed": 4,
        "failed": 4,
        "unscored": 4,
    }


def test_nothing_in_a_trajectory_comes_alive(gate: Path, tmp_path: Path) -> None:
    write_page(gate, tmp_path, {f"kat-{ATTACK}": "1"})
    for path in tmp_path.glob("*.html"):
        text = path.read_text()
        page = Page(text)
        assert not page.open
        assert not {"script", "img", "link", "iframe", "style:"} & set(page.tags)
        assert not [name for name in page.attributes if name.startswith("on")]
        assert "&lt;script&gt;alert" in text
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "default-src 'none'" in text


def test_the_same_folders_give_the_same_bytes(gate: Path, tmp_path: Path) -> None:
    first = write_page(gate, tmp_path / "a", {"m": "1"}).read_bytes()
    assert write_page(gate, tmp_path / "b", {"m": "1"}).read_bytes() == first


def test_a_folder_that_was_removed_is_left_out(gate: Path, tmp_path: Path) -> None:
    for path in gate.parents[1].glob("*.evaluate/*/*.jsonl"):
        path.unlink()
    write_page(gate, tmp_path, {})
    assert "0 of 0" in (tmp_path / "rollouts-shell.html").read_text()


def test_every_pattern_of_passing_is_chosen_before_one_is_repeated() -> None:
    many = {f"t{number:03d}": 0.0 for number in range(500)}
    columns = {"base": many, "rl": many | {"t007": 1.0, "t400": 1.0}}
    chosen = choose(columns, num=10)
    assert len(chosen) == len(set(chosen)) == 10
    assert {"t007", "t400"} < set(chosen)


def test_a_page_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rl.jsonl"
    write_lines(path, [rollout(f"t{number}", 0.0, "x" * 10_000) for number in range(30)])
    monkeypatch.setattr(browse, "_MAX_PAGE_CHARS", 20_000)
    text = browse.render({"rl": path})
    assert len(text) < 25_000
    assert "more characters" in text
    assert "of 30 held-out tasks" in text


def test_only_the_main_path_is_shown(tmp_path: Path) -> None:
    turns = (turn(-1, "Do.", "aside", "discarded"), turn(-1, "Do.", "kept"))
    one = Rollout("t", "t", "d", "", 0, Outcome.SCORED, Trajectory("t", turns), Verdict(1.0))
    write_lines(tmp_path / "x.jsonl", [one])
    text = browse.render({"x": tmp_path / "x.jsonl"})
    assert "kept" in text
    assert "aside" not in text


def test_a_curve_needs_two_points_that_are_numbers() -> None:
    assert curve("loss", [(0, 1.0)]) == ""
    assert curve("loss", [(0, 1.0), (1, float("nan"))]) == ""
    assert "polyline" in curve("loss", [(0, 1.0), (1, 1.0)])
    assert curve("loss", ((float(step), 1.0) for step in range(100_000))).count(",") < 1000


def test_lone_surrogates_and_controls_can_be_written() -> None:
    assert escape("a\ud800\x00\n").encode() == "a\ufffd\u2400\n".encode()
