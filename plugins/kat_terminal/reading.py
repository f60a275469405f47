"""Kinds that cannot be solved without reading what an earlier command printed.

The prompt says where an order is, not what it is. The order is one of five in plain English about names that
the prompt does not hold, so no command can carry it out unread; `tests/kat_terminal` replays other
instances' solutions blindly and finds that they fail.
"""

import json
from collections.abc import Mapping

from kat_terminal.scene import Draw, Order, Scene, order


def _scene(
    prompt: str, draw: Draw, found: Order, files: Mapping[str, str], *reads: str, commit: str = ""
) -> Scene:
    start = {**draw.others(1), **files, **found.files}
    return Scene(
        prompt,
        start,
        found.after(start),
        [*reads, found.command],
        wrong=f"cat {draw.unused()}",
        checks=found.checks,
        commit=commit,
    )


def note(draw: Draw) -> Scene:
    """An order in a file."""
    name, found = draw.name(".txt"), order(draw)
    return _scene(f"Do what {name} says.", draw, found, {name: f"{found.text}\n"}, f"cat {name}")


def chain(draw: Draw) -> Scene:
    """A file that points to the file with the order."""
    name, other, found = draw.name(".txt"), draw.name(".txt"), order(draw)
    files = {name: f"see {other}\n", other: f"{found.text}\n"}
    return _scene(
        f"Start with {name} and do what you are told.",
        draw,
        found,
        files,
        f"cat {name}",
        f"cat {other}",
    )


def commit_message(draw: Draw) -> Scene:
    """An order in the last commit's message."""
    found = order(draw)
    return _scene(
        "Do what the last commit says.",
        draw,
        found,
        {},
        "git log -1 --format=%s",
        commit=found.text,
    )


def json_order(draw: Draw) -> Scene:
    """An order in a field of a JSON file."""
    name, key, found = f"{draw.word()}.json", draw.word(), order(draw)
    text = json.dumps({draw.word(): draw.number(), key: found.text}) + "\n"
    return _scene(
        f"Do what {key} in {name} says.", draw, found, {name: text}, f"jq -r .{key} {name}"
    )


def search(draw: Draw) -> Scene:
    """An order in a file that has to be found by a word."""
    name, mark, found = draw.name(".txt"), draw.word(), order(draw)
    files = {name: f"{draw.word()}\n{mark}: {found.text}\n"}
    return _scene(
        f"A file here has an order after {mark}. Do it.",
        draw,
        found,
        files,
        f"grep -h {mark} *.txt",
    )


def last_line(draw: Draw) -> Scene:
    """An order at the end of a log."""
    name, found = draw.name(".log"), order(draw)
    lines = [f"{draw.number()} ok", f"{draw.number()} ok", f"todo: {found.text}"]
    files = {name: "\n".join(lines) + "\n"}
    return _scene(f"Do what the end of {name} asks for.", draw, found, files, f"tail -n 1 {name}")


def failing_script(draw: Draw) -> Scene:
    """A script that stops until its folder or its file is there."""
    name, thing = f"{draw.word()}.sh", draw.word()
    flag, made = draw.random.choice((("d", f"mkdir {thing}"), ("f", f"touch {thing}")))
    what = "folder" if flag == "d" else "file"
    text = f"[ -{flag} {thing} ] || {{ echo no {what} {thing}; exit 1; }}\n"
    files = {**draw.others(), name: text}
    undo = f"rmdir {thing}" if flag == "d" else f"rm {thing}"
    return Scene(
        f"Make {name} pass.",
        files,
        files,
        [f"bash {name}", made],
        wrong=f"bash {draw.unused()}.sh",
        confirm=f"bash {name}",
        checks=[f"[ -{flag} {thing} ]", f"bash {name}", undo],
    )


def wanted_argument(draw: Draw) -> Scene:
    """A script that says which word it must be given."""
    name, out, word, files = f"{draw.word()}.sh", draw.name(), draw.word(), draw.others()
    text = f'[ "$1" = {word} ] || {{ echo "give me {word}"; exit 1; }}\necho $1 > {out}\n'
    files |= {name: text}
    return Scene(
        f"Run {name} so that it works.",
        files,
        {**files, out: f"{word}\n"},
        [f"bash {name}", f"bash {name} {word}"],
        wrong=f"bash {name} {draw.unused()}",
        confirm="ls",
    )


KINDS = (
    note,
    chain,
    commit_message,
    json_order,
    search,
    last_line,
    failing_script,
    wanted_argument,
)
