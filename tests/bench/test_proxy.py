"""The benchmark of the proxy: its rows say what they mean, and nothing that is lost is left out."""

import json
import os
import stat
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from katcore.bench import litellm, proxy
from katcore.bench.aim import Aim
from katcore.bench.client import Plan, measure
from katcore.bench.disk import bare_fsync_ms, percentile
from katcore.bench.exchange import answer_chunks, body, read_answer
from katcore.bench.mock import Mock, MockSettings
from katcore.bench.process import Process
from katcore.bench.proxy import Settings
from katcore.cli import app
from katcore.errors import BenchError


def test_the_command_gives_a_row_for_each_number_of_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))
    command = ["bench", "proxy", "--streams", "1,4", "--requests", "8", "--rounds", "1"]
    result = CliRunner().invoke(app, [*command, "--no-litellm", "--json"])
    assert result.exit_code == 0, result.output
    one, four = json.loads(result.stdout)["rows"]
    assert (one["streams"], four["streams"]) == (1, 4)
    for row in (one, four):
        assert row["lost"] == 0
        assert row["rps_litellm"] is None
        assert set(row["routes"]) == {"direct", "katcore", "katcore-ids"}
        for route in row["routes"].values():
            assert route["ms_p50"] <= route["ms_p95"] <= route["ms_p99"]
            assert route["why"] == {}
        ours, alone = row["routes"]["katcore"], row["routes"]["direct"]
        assert row["added_ms_p50"] == pytest.approx(ours["ms_p50"] - alone["ms_p50"])
        assert (row["rps"], row["rps_direct"]) == (ours["rps"], alone["rps"])
        assert ours["fsync_ms_p50"] > 0
    assert {route["num"] for route in one["routes"].values()} == {8}
    assert {route["num"] for route in four["routes"].values()} == {12}, "three of each at least"
    assert "less a bare fsync" in json.loads(result.stdout)["aims"][0]["what"]
    assert os.listdir(tmp_path / "bench") == [], "nothing is left"


async def test_answers_that_lack_their_end_are_lost(tmp_path: Path) -> None:
    settings = Settings(streams=(4,), requests=20, rounds=1, cut_every=5)
    steps: list[str] = []
    report = await proxy.run(settings, tmp_path, lambda _: None, steps.append)
    (row,) = report.rows
    assert len(steps) == settings.num_runs
    assert row.routes["direct"].why == {"the stream has no end": row.routes["direct"].lost}
    for name in ("direct", "katcore", "katcore-ids"):
        assert 4 <= row.routes[name].lost <= 6, "one in five of twenty and four to warm up"
    assert row.lost == row.routes["katcore"].lost + row.routes["katcore-ids"].lost
    assert not report.is_lossless


async def test_each_answer_is_counted_once() -> None:
    url = await Mock(MockSettings(chunks=5, delay_ms=1.0, cut_every=3)).start()
    for is_streamed in (True, False):
        found = await measure(Plan(url, ["a", "b"], 5, 0, 5, is_streamed))
        assert len(found["ids"]) + sum(found["failures"].values()) == 12
        assert sum(found["failures"].values()) == 4
        assert len(found["latencies_ms"]) <= 10


async def test_a_server_that_is_not_there_loses_all() -> None:
    found = await measure(Plan("http://127.0.0.1:9", ["a"], 2, 0, 5, True))
    assert not found["ids"]
    assert sum(found["failures"].values()) == 3


def test_an_answer_that_is_not_in_the_log_is_lost() -> None:
    seen = proxy._Seen(1.0, [1.0, 2.0], ["chatcmpl-a", "chatcmpl-b"], Counter({"torn": 1}))
    assert seen.figures(None).why == {"torn": 1}
    figures = seen.figures({"a"})
    assert figures.lost == 2
    assert figures.why == {"torn": 1, "answered, but not in the log": 1}


def test_requests_are_alike_to_no_other() -> None:
    bodies = [body(stream, number, is_streamed=True) for stream in (1, 2) for number in (1, 2)]
    contents = [[item["content"] for item in json.loads(data)["messages"]] for data in bodies]
    assert len({content for said in contents for content in said}) == 4 * 6
    assert all(3500 < sum(map(len, said)) < 4700 for said in contents)
    assert bodies[0] == body(1, 1, is_streamed=True)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no end"),
        (b'data: {"id":"x","choices":[]}\n\n', "no end"),
        (b'data: {"error":{"message":"m"}}\n\ndata: [DONE]\n\n', "an error in the stream"),
        (b'data: {"id":"x","choices":[]}\n\ndata: [DONE]\n\n', "why it ended"),
    ],
)
def test_half_an_answer_is_none(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_answer(data, is_streamed=True)


def test_the_answer_has_as_many_chunks_as_asked_for() -> None:
    assert len(answer_chunks(7)) == 7
    assert "".join(answer_chunks(1)) == "done"


async def test_a_part_that_dies_says_why(tmp_path: Path) -> None:
    async with Process("katcore.bench.mock", tmp_path) as mock:
        with pytest.raises(BenchError, match=r"(?s)bench.mock ended with 1: .*unexpected keyword"):
            await mock.ask({"no": "setting"})


def test_a_wrong_path_to_litellm_says_what_would_do(tmp_path: Path) -> None:
    command = ["bench", "proxy", "--litellm", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "litellm[proxy]" in result.stderr.replace("\n", " ")
    assert "--no-litellm" in result.stderr


@pytest.mark.parametrize("streams", ["", "0", "1,x", "-4"])
def test_streams_are_numbers(streams: str) -> None:
    result = CliRunner().invoke(app, ["bench", "proxy", "--no-litellm", "--streams", streams])
    assert result.exit_code == 2
    assert "numbers from 1 on" in result.stderr


def program(folder: Path, script: str) -> Path:
    path = folder / "bin" / "litellm"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return litellm.find(folder)


async def test_a_litellm_that_does_not_start_says_its_last_words(tmp_path: Path) -> None:
    broken = program(tmp_path, "echo no such module; exit 3")
    with pytest.raises(BenchError, match="LiteLLM ended with 3: no such module"):
        async with litellm.serving(broken, "http://127.0.0.1:9", tmp_path):
            pass


async def test_litellm_is_started_with_one_worker_and_nothing_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://secret")
    broken = program(tmp_path, 'echo "$@"; env; exit 1')
    with pytest.raises(BenchError, match=r"--host 127\.0\.0\.1 .*--num_workers 1") as said:
        async with litellm.serving(broken, "http://127.0.0.1:9", tmp_path):
            pass
    assert "DATABASE_URL" not in str(said.value)
    assert "api_base: http://127.0.0.1:9/v1" in (tmp_path / "litellm.yaml").read_text()


_UV = """
[ "$1" = venv ] && { mkdir -p "$4/bin"; exit; }
echo "$@" >> "$KATCORE_HOME/asked"
[ -e "$KATCORE_HOME/offline" ] && { echo no route; exit 1; }
folder=$(dirname "$(dirname "$4")")
mkdir -p "$folder/lib/python3.11/site-packages/litellm-1.2.3.dist-info"
touch "$folder/bin/litellm"
"""


def test_litellm_is_installed_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, _UV).rename(tmp_path / "bin" / "uv")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))
    (tmp_path / "offline").touch()
    with pytest.raises(BenchError, match="no route; or take --no-litellm"):
        litellm.ensure(tmp_path / "bench", lambda _: None)
    (tmp_path / "offline").unlink()
    said: list[str] = []
    made = litellm.ensure(tmp_path / "bench", said.append)
    assert made == litellm.ensure(tmp_path / "bench", said.append)
    assert len(said) == 1
    assert f"litellm[proxy]=={litellm.VERSION}" in said[0]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2, "tried, and tried again"
    assert asked[1].endswith(f"litellm[proxy]=={litellm.VERSION}")
    assert litellm.version(made) == "1.2.3"


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99)] == [50.0, 95.0, 99.0]
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([], 0.5) is None


def test_the_bound_leaves_no_file(tmp_path: Path) -> None:
    assert len(bare_fsync_ms(tmp_path, 100, 3)) == 3
    assert not list(tmp_path.iterdir())


def test_aims_say_whether_they_are_met() -> None:
    assert Aim.at_most("a", 3.0, 3).is_met
    assert not Aim.at_most("a", 3.1, 3).is_met
    assert Aim.at_least("a", 0.4, 0.4).is_met
    assert not Aim.at_least("a", 0.39, 0.4).is_met
