"""Pages of made-up rollouts: what they tell, and that nothing in them comes alive."""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from katcore.cli import app
from katcore.errors import ConfigError, KatError, StageError
from katcore.pipeline import mask, outline
from katcore.pipeline.view import page_name, render, write_views
from katcore.schema.call import Message, Tool, ToolCall
from katcore.schema.codec import to_json, write_lines
from katcore.schema.rollout import Flag, Outcome, Rollout, Trajectory, Turn, Verdict
from tests.trajectory import made
from tests.trajectory.made import TOOLS, Recorder

ATTACK = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>\x1b[31m\x00\u202e"
TEXTS = {code: chr(code) for code in range(32, 127)} | {3: "<|im_end|>", 10: "\n"}
PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8A"
    "AAAASUVORK5CYII="
)
SCHEMA = (
    '{"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}'
)


class Page(HTMLParser):
    """The tags of a page in order, its attributes, and the tags that are open at its end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in {"meta", "br", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]


def turn(parent: int = -1, text: str = "ok", **facts: Any) -> Turn:
    shared = 0 if parent < 0 else 2
    given: dict[str, Any] = {
        "num_shared_messages": shared,
        "num_shared": shared,
        "prompt_ids": (104, 105),
        "ids": (111, 107),
        "logprobs": (-0.01, -9.0),
        "messages": (Message("user", "Do it."),),
        "policy_version": "7",
    }
    return Turn(parent=parent, text=text, **(given | facts))


def rollout(*turns: Turn, **facts: Any) -> Rollout:
    given: dict[str, Any] = {
        "id": "r",
        "outcome": Outcome.SCORED,
        "verdict": Verdict(1.0),
        "trajectory": Trajectory("s", turns),
    }
    return Rollout(task_id="t", domain="d", group="g", attempt=0, **(given | facts))


def asks(number: int, name: str, **arguments: Any) -> Message:
    return Message(
        "assistant", "", tool_calls=(ToolCall(f"c{number}", name, json.dumps(arguments)),)
    )


def session() -> list[Any]:
    """An agent that names its task, asks again, starts a sub-agent, and sums up what it did."""
    tools = (Tool("bash", "Runs a command in the sandbox.", SCHEMA), *TOOLS)
    inner_tools = (Tool("read", "Reads a file.", SCHEMA),)
    recorder = Recorder()
    system = Message("system", "You are a coding agent.\n" + "Be careful.\n" * 30)
    history = [system, Message("user", "The test of parse() fails. Find out why, and repair it.")]
    recorder.say([Message("system", "Name it."), history[1]], "Repair parse()")
    recorder.say(history, "I cannot.", tools)
    history += [recorder.say(history, asks(1, "agent", prompt="Where is parse()?"), tools)]
    inner = [Message("system", "You look around."), Message("user", "Where is parse()?")]
    inner += [recorder.say(inner, asks(2, "read", path="src/parse.py"), inner_tools)]
    inner += [Message("tool", "def parse(text):\n    return int(text) + 1\n", tool_call_id="c2")]
    found = recorder.say(inner, "In src/parse.py; it adds one too many.", inner_tools)
    history += [Message("tool", found.content, tool_call_id="c1", images=(PNG,))]
    script = "sed -i 's/ + 1//' src/parse.py\npytest -q tests/test_parse.py"
    history += [recorder.say(history, asks(3, "bash", command=script, timeout=60), tools)]
    history += [Message("tool", "1 passed in 0.02s", tool_call_id="c3")]
    recorder.say(history, "parse() added one to every number. It is repaired.", tools)
    return recorder.calls


def rich(**facts: Any) -> Rollout:
    one = made.rollout(session(), exit_reason="exit 0", scaffold="claude-code 2.1.330", **facts)
    drawn = random.Random(1)
    turns = []
    for item in one.trajectory.turns:
        logprobs = tuple(-(8 * drawn.random() ** 6) for _ in item.ids)
        thought = "The test expects 4, and got 5." if item.tool_calls else ""
        turns.append(replace(item, logprobs=logprobs, reasoning=thought))
    seconds = {"open": 0.9, "agent": 12.4, "verify": 1.1}
    return replace(one, trajectory=Trajectory("s", tuple(turns)), seconds=seconds)


def section(text: str, number: int) -> str:
    return text.partition(f'id="turn-{number}"')[2].partition("</section>")[0]


def strip(text: str, name: str) -> str:
    """The spans of the first tokens of this class."""
    found = re.search(rf'<div class="tokens {name}">(.*?)</div>', text, re.DOTALL)
    return found.group(1) if found else ""


def test_the_head_tells_how_it_ended() -> None:
    verdict = Verdict(0.5, "one test of two passed", {"num_passed": 1.0})
    text = render(rich(verdict=verdict), TEXTS)
    for said in (
        "<h1>s</h1>", "<code>t</code>", "claude-code 2.1.330", "the verifier gave a verdict",
        'class="outcome scored"', "reward 0.5", "one test of two passed", "num_passed <b>1</b>",
        "exit 0", "open 0.9, agent 12.4, verify 1.1; in all 14.4",
    ):  # fmt: skip
        assert said in text, said
    assert text.count("one test of two passed") == 2, "in the head, and at the end"
    assert not Page(text).open


def test_flags_are_shown_on_the_page_and_in_the_index(tmp_path: Path) -> None:
    flags = (Flag("canary", "</p>read"), Flag("survivor", "python3"), Flag("canary", "again"))
    one = rollout(turn(), verdict=Verdict(0.0, flags=flags))
    text = render(one, {})
    assert text.count("<b>flagged: canary</b> &lt;/p&gt;read") == 2
    assert "<b>flagged: survivor</b> python3" in text
    write_lines(tmp_path / "rollouts.jsonl", [one, replace(one, id="s", verdict=Verdict(0.0))])
    assert write_views(tmp_path).read_text().count("flagged: canary, survivor</b>") == 1


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_has_a_colour_and_says_whose_fault_it_was(outcome: Outcome) -> None:
    text = render(rollout(turn(), outcome=outcome, error="open: it broke"), {})
    assert f'class="outcome {outcome}"' in text
    assert f".outcome.{outcome} {{ color:" in text
    assert "open: it broke" in text
    if outcome is not Outcome.SCORED:
        assert "it has no reward" in text
        assert "reward 1" not in text
        assert "not trained: the rollout was not scored" in text


def test_turns_have_roles_and_stand_in_a_tree() -> None:
    one = rich()
    roles = [item.role for item in one.trajectory.turns]
    assert roles == ["auxiliary", "discarded", "main", "subagent", "subagent", "main", "main"]
    assert outline.levels(one.trajectory.turns) == [1, 1, 0, 1, 1, 0, 0]
    text = render(one, TEXTS)
    for number, role in enumerate(roles):
        assert text.count(f'href="#turn-{number}"') >= 2
        assert f'<section class="turn {role}" id="turn-{number}">' in text
        assert f"--{role}:" in text, "a colour"
    assert "begins anew" in section(text, 3)
    assert 'asks the same as <a href="#turn-1">turn 1</a>' in section(text, 2)
    shares = one.trajectory.turns[5]
    assert (
        f"shares {shares.num_shared_messages} messages and {shares.num_shared} tokens"
        in section(text, 5)
    )
    assert 'goes on from <a href="#turn-2">turn 2</a>' in section(text, 5)


def test_a_fork_is_indented_and_the_last_of_a_conversation_is_not() -> None:
    first = turn()
    forks = [turn(0), turn(1, num_shared_messages=1), turn(0), turn(0, role="subagent")]
    asides = [turn(3, role="discarded"), turn(5, num_shared_messages=1), turn(6, role="auxiliary")]
    turns = (first, *forks, *asides)
    assert outline.levels(turns) == [0, 1, 1, 0, 1, 1, 0, 1]
    assert [outline.relation(turns, number) for number in range(3)] == [
        "",
        "goes on from",
        "forks off",
    ]
    text = render(rollout(*turns), {})
    assert "forks off 1" in text
    assert 'style="--level:1"' in text


def test_a_parent_that_is_no_earlier_turn_is_none() -> None:
    assert outline.levels((turn(0), turn(7), turn(-9))) == [0, 0, 0]
    assert "begins anew" in section(render(rollout(turn(0)), {}), 0)


def test_a_very_long_chain_of_forks_stays_on_the_page() -> None:
    turns = [turn(), *(turn(number // 2) for number in range(100))]
    assert max(outline.levels(turns)) > 3
    levels = re.findall(r"--level:(\d+)", render(rollout(*turns), {}))
    assert max(map(int, levels)) <= 12


def test_a_turn_tells_what_it_was_asked_and_what_it_answered() -> None:
    text = render(rich(), TEXTS)
    main = section(text, 5)
    for said in (
        "tool to call <code>c1</code>", "calls <b>bash</b> <code>c3</code>", "<dt>timeout</dt>",
        "sed -i &#x27;s/ + 1//&#x27; src/parse.py\npytest", "The test expects 4, and got 5.",
        "policy 3", "sampled", "; exact;", "asked at 5.0 s, answered in 0.50 s",
    ):  # fmt: skip
        assert said in main, said
    assert "330 characters" not in main
    assert "<details><summary>You are a coding agent. <small>" in section(text, 1), "it is long"
    assert "2 tools are offered" in section(text, 1)
    assert "1 tool is offered" in section(text, 3)
    assert "No tools are offered" in section(text, 0)
    assert "offered" not in section(text, 5), "as its parent"
    assert "not exact" in render(rollout(turn(is_exact=False)), {})


def test_arguments_are_shown_whatever_they_are() -> None:
    deep = "[" * 500 + "]" * 500
    for arguments, shown in (
        ('{"a": {"b": [1]}}', "<dt>a</dt><dd><pre class=\"\">\n{\n  &quot;b&quot;: [\n    1\n  ]\n}</pre>"),
        ("[1, 2]", "[\n  1,\n  2\n]"),
        ("{not json", "{not json"),
        ('{"a": ""}', "&quot;&quot;"),
        ('{"a": "\\ud800"}', "\ufffd"),
        (f'{{"a": {deep}}}', "[" * 20),
        ("[" * 100_000, "[" * 100),
    ):  # fmt: skip
        call = ToolCall("c", "x", arguments)
        assert shown in render(rollout(turn(tool_calls=(call,))), {}), arguments[:30]


def test_what_is_long_is_collapsed_and_what_is_huge_is_cut() -> None:
    def shown(text: str) -> str:
        return section(render(rollout(turn(messages=(Message("user", text),), ids=())), {}), 0)

    assert '<pre class="">\n\nshort' in shown("\nshort"), "its first line end stays"
    assert "long</b>" not in shown("long</b>" * 500)
    assert "<details><summary>long" in shown("long" * 500)
    assert "more characters]" in shown("x" * 100_001)
    assert len(shown("x" * 3_000_000)) < 150_000


def test_the_colour_of_a_token_is_its_probability() -> None:
    logprobs = (-0.0, -0.1, -0.2, -1.0, -3.0, -5.0, -20.0, float("nan"))
    one = turn(ids=tuple(range(97, 105)), logprobs=logprobs, prompt_ids=())
    spans = strip(section(render(rollout(one), TEXTS), 0), "trained")
    found = re.findall(r'<span class=p(\d) title="(\d+) ([^"]+)">(.*?)</span>', spans)
    assert [colour for colour, *_ in found] == list("00123455")
    assert found[2] == ("1", "99", "-0.2000", "c")
    text = render(rollout(one), TEXTS)
    for number in range(1, 6):
        assert f".p{number} {{ background:" in text
    assert "90 % or more" in text
    assert "less than 0.1 %" in text


@pytest.mark.parametrize(
    ("facts", "name", "said"),
    [
        ({}, "trained", "; trained;"),
        ({"role": "subagent"}, "trained", "; trained;"),
        ({"role": "post-compaction"}, "trained", "; trained;"),
        ({"role": "auxiliary"}, "untrained", "not trained: auxiliary"),
        ({"role": "discarded"}, "untrained", "not trained: discarded"),
        ({"origin": "scripted"}, "imitated", "trained by fine-tuning only: scripted, not sampled"),
        ({"origin": "tokenised"}, "imitated", "by fine-tuning only: tokenised, not sampled"),
    ],
)
def test_tokens_say_whether_a_loss_trains_them(facts: dict[str, Any], name: str, said: str) -> None:
    text = section(render(rollout(turn(**facts)), TEXTS), 0)
    assert said in text
    assert re.sub("<[^>]+>", "", strip(text, name)) == "ok"
    assert ("class=p" in strip(text, name)) == ("origin" not in facts), "only what was drawn"
    assert re.sub("<[^>]+>", "", strip(text, "context")) == "hi"
    assert "class=p" not in strip(text, "context")


def test_an_answer_of_a_service_has_no_tokens() -> None:
    one = turn(ids=(), logprobs=(), prompt_ids=(), origin="api", text="from a service")
    text = section(render(rollout(one), {}), 0)
    assert "from a service" in text
    assert "token" not in text


def test_a_token_without_text_is_shown_as_its_id() -> None:
    spans = strip(
        section(render(rollout(turn(ids=(10, 111))), {111: "<b>", 10: "\n"}), 0), "trained"
    )
    assert "↵\n" in spans
    assert "&lt;b&gt;" in spans
    assert "⟨111⟩" in render(rollout(turn()), {})
    assert "⟨111⟩" in render(rollout(turn()), {111: ""})


def test_a_page_shows_answers_first_when_there_are_too_many_tokens() -> None:
    many = tuple(range(30_000))
    one = turn(prompt_ids=many, ids=many, logprobs=(-0.5,) * 30_000)
    assert mask.allot((one, turn(0), one)) == [(30_000, 0), (2, 0), (19_998, 0)]
    assert mask.allot((one, turn(0))) == [(30_000, 19_998), (2, 0)]
    text = render(rollout(one, turn(0), one), {})
    assert "10,002 tokens left out: a page shows at most 50,000." in text
    assert 50_000 <= text.count("<span") < 50_100


def test_a_big_rollout_takes_seconds() -> None:
    ids = tuple(range(500))
    said = (Message("tool", "line of output\n" * 300, tool_call_id="c1"),)
    first = turn(prompt_ids=ids, ids=ids, logprobs=(-0.5,) * 500, messages=said)
    more = [replace(first, parent=number) for number in range(199)]
    before_s = time.process_time()
    text = render(rollout(first, *more), {number: f"t{number}" for number in range(500)})
    assert time.process_time() - before_s < 5
    assert len(text) < 10_000_000


def test_nothing_in_a_rollout_comes_alive(tmp_path: Path) -> None:
    call = ToolCall(ATTACK, ATTACK, json.dumps({ATTACK: ATTACK, "x": [ATTACK]}))
    images = (f"https://example.com/{ATTACK}", f"{PNG}{ATTACK}", "data:image/svg+xml;base64,AAAA")
    said = (Message("user", ATTACK, ATTACK, (call,), ATTACK, images), Message("tool", ATTACK * 99))
    hostile = turn(
        text=ATTACK, reasoning=ATTACK, messages=said, policy_version=ATTACK,
        tool_calls=(call,), tools=(Tool(ATTACK, ATTACK, ATTACK),),
    )  # fmt: skip
    one = Rollout(
        ATTACK, ATTACK, ATTACK, ATTACK, 0, Outcome.SCORED, Trajectory(ATTACK, (hostile,)),
        Verdict(0.0, ATTACK, {ATTACK: 1.0}), ATTACK, ATTACK, {ATTACK: 1.0}, ATTACK,
    )  # fmt: skip
    write_lines(tmp_path / "rollouts.jsonl", [one])
    (tmp_path / "tokens.json").write_text(json.dumps({111: ATTACK}))
    write_views(tmp_path)
    pages = sorted((tmp_path / "view").glob("*.html"))
    assert len(pages) == 2
    for path in pages:
        text = path.read_text()
        page = Page(text)
        assert not page.open
        assert not {"script", "img", "link", "iframe", "object", "form"} & set(page.tags)
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        assert "&lt;script&gt;alert" in text
        assert not set("\x1b\x00\u202e") & set(text)
        assert "default-src 'none'" in text


def test_nothing_is_loaded_from_elsewhere() -> None:
    images = (PNG, PNG.replace("png", "jpeg"), "http://example.com/a.png", "file:///etc/passwd")
    one = rich()
    shown = turn(messages=(Message("user", "see", images=images),))
    text = render(replace(one, trajectory=Trajectory("s", (*one.trajectory.turns, shown))), TEXTS)
    page = Page(text)
    for target in page.values("src", "href", "srcset", "action", "data", "poster"):
        assert target.startswith(("#turn-", "data:image/")) or target == "index.html", target
    assert page.tags.count("img") == 3
    assert text.count("(image) not shown: ") == 2
    assert "(image) png, 0.1 KiB" in text
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "img-src data:" in text
    assert "img-src" not in render(rollout(turn()), {}), "only where there are images"


def test_images_that_are_too_heavy_are_named_only() -> None:
    heavy = f"data:image/png;base64,{'A' * 6_000_000}"
    said = Message("user", "see", images=(heavy,) * 4)
    text = render(rollout(turn(messages=(said,))), {})
    assert text.count("<img") == 2
    assert text.count("(image) png, 4,394.5 KiB; left out") == 2


def test_the_same_rollout_gives_the_same_page() -> None:
    assert render(rich(), TEXTS) == render(rich(), TEXTS)


def test_a_page_has_a_name_of_its_own() -> None:
    taken = {"index"}
    ids = (
        "a.1",
        "a.1",
        "A.1",
        "../../etc",
        "x/y",
        "x:y",
        "index",
        "",
        ".hidden",
        "é" * 300,
        "a.1-2",
    )
    names = [page_name(name, taken) for name in ids]
    assert names[:2] == ["a.1.html", "a.1-2.html"]
    assert len({name.lower() for name in names} | {"index.html"}) == len(ids) + 1
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.html", name), name
        assert len(name) < 130


def test_the_index_lists_all_and_links_to_each(tmp_path: Path) -> None:
    lost = rollout(turn(), id="lost/2", outcome=Outcome.ENGINE_FAILED, error="gone")
    write_lines(tmp_path / "rollouts.jsonl", [rich(), lost])
    (tmp_path / "tokens.json").write_text(json.dumps(TEXTS))
    index = write_views(tmp_path)
    assert index == tmp_path / "view" / "index.html"
    text = index.read_text()
    links = Page(text).values("href")
    assert len(links) == 2
    assert all((index.parent / link).is_file() for link in links)
    turns = rich().trajectory.turns
    num_tokens = sum(len(item.prompt_ids) + len(item.ids) for item in turns)
    for said in ("2 of them", "claude-code 2.1.330", "exit 0", "engine-failed", "14.4", "lost/2"):
        assert said in text, said
    assert f"<td class=number>{len(turns)}</td><td class=number>{num_tokens:,}</td>" in text
    assert "⟨" not in strip((index.parent / "s.html").read_text(), "trained")
    first = write_views(tmp_path, tmp_path / "first", limit=1)
    assert "1 of them" in first.read_text()
    assert len(list(first.parent.iterdir())) == 2


def test_without_texts_of_tokens_ids_are_shown(tmp_path: Path) -> None:
    write_lines(tmp_path / "rollouts.jsonl", [rollout(turn())])
    index = write_views(tmp_path, tmp_path / "out")
    assert "⟨111⟩" in (index.parent / "r.html").read_text()
    assert not (tmp_path / "view").exists()


def test_what_a_stage_wrote_is_not_changed(tmp_path: Path) -> None:
    folder = tmp_path / "stages" / "terminal.rl" / "0123.work" / "out"
    folder.mkdir(parents=True)
    write_lines(folder / "rollouts.jsonl", [rollout(turn())])
    write_lines(folder / "base.greedy.swe.jsonl", [rollout(turn())])
    beside = tmp_path / "view" / "terminal.rl" / "0123.work" / "out"
    assert write_views(folder) == beside / "index.html"
    assert (
        write_views(folder / "base.greedy.swe.jsonl") == beside / "base.greedy.swe" / "index.html"
    )
    assert len(list(folder.iterdir())) == 2


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    line = to_json(rollout(turn()))
    path.write_bytes(line + b"\n" + line[:50])
    assert "1 of them" in write_views(path).read_text()
    path.write_bytes(line)
    assert "1 of them" in write_views(path).read_text()


def refused(path: Path, *options: str | Path) -> str:
    result = CliRunner().invoke(app, ["view", *map(str, (path, *options))])
    assert result.exit_code == 2, f"{result.output}{result.exception!r}"
    return " ".join(result.output.split())


def test_the_verb_prints_the_index(tmp_path: Path) -> None:
    write_lines(tmp_path / "rollouts.jsonl", [rollout(turn())])
    result = CliRunner().invoke(app, ["view", str(tmp_path), "--out", str(tmp_path / "a" / "b")])
    assert result.exit_code == 0
    assert result.output == f"{tmp_path / 'a' / 'b' / 'index.html'}\n"
    assert Path(result.output.strip()).is_file()


def test_errors_say_what_was_found_and_what_would_do(tmp_path: Path) -> None:
    assert "no such file or folder; give a rollouts.jsonl" in refused(tmp_path / "nowhere")
    assert "no rollouts.jsonl in this folder; give a folder that" in refused(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    empty = tmp_path / "a" / "b" / "rollouts.jsonl"
    empty.touch()
    assert "it has a/b/rollouts.jsonl; give one of these" in refused(tmp_path)
    assert "holds no rollout" in refused(empty)
    assert not (empty.parent / "view").exists()
    empty.write_bytes(to_json(rollout(turn())) + b'\n{"id": "x"}\n')
    assert "line 2: not a valid Rollout" in refused(empty)
    write_lines(empty, [rollout(turn())])
    (empty.parent / "tokens.json").write_text("[1]")
    assert "expected a JSON object with the text of each token id" in refused(empty)
    (empty.parent / "tokens.json").unlink()
    assert "File exists" in refused(empty, "--out", empty)


@pytest.mark.parametrize(
    ("content", "kind"), [(b"", ConfigError), (b"\n", StageError), (b"\xff\n", StageError)]
)
def test_every_refusal_is_an_error_of_ours(
    tmp_path: Path, content: bytes, kind: type[KatError]
) -> None:
    (tmp_path / "rollouts.jsonl").write_bytes(content)
    with pytest.raises(kind):
        write_views(tmp_path)


def photograph(page: Path, picture: Path, size: tuple[int, int]) -> None:
    command: Sequence[str] = (
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={picture.parent / 'profile'}", f"--window-size={size[0]},{size[1]}",
        f"--screenshot={picture}", page.as_uri(),
    )  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@pytest.mark.slow
def test_a_browser_shows_a_page(tmp_path: Path) -> None:
    if not shutil.which("chromium"):
        assert "chromium" not in os.environ.get("KATCORE_REQUIRE", ""), "chromium is not on PATH"
        pytest.skip("chromium is not on PATH")
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(render(rich(), TEXTS), encoding="utf-8")
    photograph(page, picture, (1200, 1600))
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (1200, 1600)
    assert len(data) > 30_000, "a blank page takes a few kB"
