"""Shell commands for a sandbox that is reached by text alone: exact bytes come through as base64."""

import base64
import binascii
import gzip
import os
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence

from katcore.sandbox import history
from katcore.schema.rollout import ExecResult

OUTPUT_LIMIT = 1 << 18
"""Providers bound what a command may say as text, at about a mebibyte."""
FOLDER = "/tmp/.katcore"
_EXEC = """
mkdir -p {folder}; d=$(mktemp -d {folder}/XXXXXX) && mkfifo "$d/0" || exit 99
before=" $(cd /proc && echo [0-9]*) $$ "
( cd {cwd} || exit 126; exec timeout -k 0.1 {timeout} env {command} ) >"$d/1" 2>"$d/2" </dev/null
c=$?
case $c in 124|137)
  i=0 left=1; while [ $left ] && [ $i -lt {rounds} ]; do i=$((i+1)) left=; cd /proc; for p in [0-9]*; do
    case "$before" in *" $p "*) ;; *) kill -9 "$p" && left=1;; esac
  done; read -t 0.02 _ <>"$d/0"; done 2>/dev/null;;
esac
echo "$c $(wc -c <"$d/1") $(wc -c <"$d/2")"
head -c {limit} "$d/1" | base64 -w 0; echo
head -c {limit} "$d/2" | base64 -w 0; echo
rm -rf "$d"
"""
"""At the time limit all processes end that were not there before, wherever they went."""
_ROUNDS = 50
"""So often, 20 ms apart: what has ended keeps others from starting, us too, until it is reaped."""
_SKIPPED = ("/proc", "/sys", "/dev", "/tmp", "/run")
_FORMAT = r"%P\0%y %m %U %G %s %T@ %C@\0"


class TornError(Exception):
    """The answer is not what the script says."""


def execute(argv: Sequence[str], cwd: str | None, env: Mapping[str, str], timeout_s: float) -> str:
    """A command that runs `argv` and says all of it; `answer` reads that. Raises ValueError: a null byte."""
    words = [f"{name}={value}" for name, value in env.items()]
    if any("\0" in word for word in (*words, *argv, cwd or "")):
        raise ValueError("embedded null byte")
    program = shlex.join([*words, "sh", "-c", 'exec "$0" "$@"', *argv])
    return _EXEC.format(
        folder=FOLDER,
        cwd=shlex.quote(cwd) if cwd else ".",
        timeout=f"{timeout_s:.3f}",
        command=program,
        limit=OUTPUT_LIMIT,
        rounds=_ROUNDS,
    )


def answer(text: str) -> ExecResult:
    """The result that a command of `execute` says. Raises TornError."""
    lines = text.rstrip("\n").split("\n")
    try:
        numbers, stdout, stderr = [*lines, "", ""][: max(3, len(lines))]
        code, num_stdout, num_stderr = map(int, numbers.split())
        out, err = (base64.b64decode(item, validate=True) for item in (stdout, stderr))
    except (ValueError, binascii.Error) as error:
        raise TornError(f"{text[:200]!r}") from error
    return ExecResult(code, out, err, truncated=max(num_stdout, num_stderr) > OUTPUT_LIMIT)


def listing(locked: str) -> str:
    """A command that lists all files but those that no archive of changes holds, with what they are.

    What its user, the owner, may not read is opened on the way, and its modes are written to `locked`.
    """
    skipped = " -o ".join(f"-path {folder}" for folder in _SKIPPED)
    closed = "-type d \\( ! -readable -o ! -executable \\) -o -type f ! -readable"
    unlock = f"\\( {closed} \\) -fprintf {locked} '%m %P\\0' -exec chmod u+rwx {{}} \\;"
    return f"find / -xdev \\( {skipped} \\) -prune -o -printf '{_FORMAT}' {unlock} | gzip -1"


def modes(locked: bytes) -> dict[str, int]:
    """The modes that `listing` wrote to `locked`, by path; parents first."""
    lines = [
        item.split(" ", 1) for item in locked.decode(errors="surrogateescape").split("\0") if item
    ]
    return {name: int(mode, 8) for mode, name in lines}


def relock(found: Mapping[str, int]) -> bytes:
    """A script that gives files their modes again."""
    lines = [f"chmod {mode:o} -- {shlex.quote(f'/{name}')}" for name, mode in found.items()]
    return "\n".join(reversed(lines)).encode(errors="surrogateescape")


def signatures(listed: bytes) -> dict[str, str]:
    """Of a listing, what shows that a file is changed, by path without the leading slash."""
    words = gzip.decompress(listed).decode(errors="surrogateescape").split("\0")
    found = dict(zip(words[0::2], words[1::2], strict=False))
    found.pop("", None)
    return {
        name: " ".join(said.split()[:4]) if said.startswith("d") else said
        for name, said in found.items()
    }


def repositories(found: Mapping[str, str]) -> list[str]:
    """The folders of `signatures` with a git repository, or a part of one."""
    folders: defaultdict[str, set[str]] = defaultdict(set)
    files: defaultdict[str, set[str]] = defaultdict(set)
    for path, said in found.items():
        parent, name = os.path.split(path)
        (folders if said.startswith("d") else files)[parent].add(name)
    parents = sorted({*folders, *files})
    return [path for path in parents if history.is_repository(folders[path], files[path])]
