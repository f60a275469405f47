"""The sandbox's warm `python3` does what the interpreter it stands for does."""

import asyncio
import shlex
import time

import pytest

from kat_sandboxes import host
from katcore.protocols import Sandbox
from katcore.schema.rollout import ExecResult
from tests.kat_sandboxes.machines import bash, output

pytestmark = pytest.mark.asyncio(loop_scope="module")

REAL = str(host.interpreter())
_FILES = {
    "ok.py": "import sys\nprint(__name__, __file__, sys.argv)\nprint('err', file=sys.stderr)\n",
    "deep.py": "def f(n):\n    return 1 / n\n\n\nif __name__ == '__main__':\n    f(\n        0\n    )\n",
    "syntax.py": "def f(:\n    pass\n",
    "cause.py": "try:\n    {}['x']\nexcept KeyError as e:\n    raise ValueError('no') from e\n",
    "group.py": "raise ExceptionGroup('many', [ValueError(1), TypeError(2)])\n",
    "leave.py": "import sys\nsys.exit(int(sys.argv[1]))\n",
    "words.py": "import sys\nsys.exit('last words')\n",
    "neighbour.py": "import mine\nprint(mine.X)\n",
    "mine.py": "X = 'mine'\n",
    "late.py": "import atexit, threading, time\natexit.register(print, 'atexit')\n"
    "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\nprint('main')\n",
    "killed.py": "import os\nos.kill(os.getpid(), 15)\n",
    "interrupt.py": "raise KeyboardInterrupt\n",
    "coding.py": "# -*- coding: latin-1 -*-\nprint('\xe9')\n",
    "asserts.py": "assert 1 == 2, 'unequal'\n",
    "recurse.py": "def f():\n    f()\n\n\nf()\n",
    "package/__init__.py": "",
    "package/__main__.py": "import sys\nprint('main of', __package__, sys.argv[1:])\n",
    "package/part.py": "raise RuntimeError('in a part')\n",
    "children.py": "import multiprocessing as m\n\ndef f(x):\n    return x * x\n\n\nif __name__ == '__main__':\n"  # noqa: E501
    "    with m.Pool(2) as pool:\n        print(pool.map(f, range(3)))\n",
    "sub.py": "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(5)'],"
    " capture_output=True, text=True).stdout)\n",
}


async def compare(sandbox: Sandbox, command: str) -> tuple[ExecResult, ExecResult]:
    """The same command line with `python3` and with the real interpreter, in the same folder."""
    for name, text in _FILES.items():
        await sandbox.write(f"/work/{name}", text.encode("latin-1"))
    prefix = "export PYTHONHASHSEED=0; "
    warm = await bash(sandbox, prefix + command.replace("@PY", "python3"))
    real = await bash(sandbox, prefix + command.replace("@PY", f"{REAL} -S"))
    return warm, real


@pytest.mark.parametrize(
    "command",
    [
        "@PY ok.py",
        "@PY ok.py a 'b c' '' -x",
        "@PY ./ok.py; @PY /work/ok.py",
        "cd /; @PY work/ok.py",
        "@PY deep.py",
        "@PY syntax.py",
        "@PY cause.py",
        "@PY group.py",
        "@PY asserts.py",
        "@PY leave.py 0",
        "@PY leave.py 7",
        "@PY leave.py 300",
        "@PY leave.py -1",
        "@PY words.py",
        "@PY neighbour.py",
        "@PY late.py",
        "@PY coding.py",
        "@PY -m package a b",
        "@PY -m package.part",
        "@PY -m no_such_module",
        "@PY -m json.tool --help",
        "@PY -c 'import sys; print(sys.argv, __name__)' a b",
        "@PY -c 'import mine; print(mine.X)'",
        "@PY -c '1/0'",
        "@PY -c 'x ='",
        "@PY -c 'import sys; print(sys.stdin.read())' < mine.py",
        "echo 'print(1+1)' | @PY",
        "echo 'print(1+1)' | @PY -",
        "echo 'print(1/0)' | @PY - a",
        "printf 'a\\nb\\n' | @PY -c 'print(input(), input())'",
        "@PY none.py",
        "@PY -I -c 'import sys; print(sys.flags.isolated)'",
        "@PY -O -c 'assert False; print(1)'",
        "@PY -u ok.py",
        "@PY -V",
        "PYTHONPATH=/work/package @PY -c 'import part'",
        'WORD=x @PY -c \'import os; print(os.environ["WORD"], os.getenv("PYTHONHASHSEED"))\'',
        "@PY -c 'print(\"x\" * 200000)' | wc -c",
        "@PY -c 'print(\"line\\n\" * 100000)' | head -n 2",
        "@PY -c 'import os; os.write(1, b\"\\xff\\0\")' | od -c",
        "@PY children.py",
        "@PY sub.py",
        "@PY -c 'import os, sys; print(os.getcwd(), sys.version_info[:2])'",
        "@PY -c 'import sys; sys.stdout.write(\"no line end\")'",
        '@PY -c \'import sys; print("é", file=sys.stderr); print("é")\'',
        "@PY -c 'print(1)' <&-",
        "@PY -c 'import os; print(len(os.listdir(\"/proc/self/fd\")) < 6)'",
        "@PY interrupt.py",
    ],
)
async def test_it_answers_as_the_real_interpreter(sandbox: Sandbox, command: str) -> None:
    warm, real = await compare(sandbox, command)
    assert warm.exit_code == real.exit_code, warm.stderr.decode()
    assert warm.stdout == real.stdout
    assert without_name(warm.stderr) == without_name(real.stderr)


def without_name(message: bytes) -> bytes:
    """The interpreter names itself by the path it was started as."""
    return message.replace(f"{REAL}: ".encode(), b"").replace(b"python3: ", b"")


async def test_a_recursion_ends_in_the_same_error(sandbox: Sandbox) -> None:
    warm, real = await compare(sandbox, "@PY recurse.py")
    assert warm.exit_code == real.exit_code == 1
    assert warm.stderr.splitlines()[-1] == real.stderr.splitlines()[-1]


async def test_death_by_a_signal_reaches_the_caller(sandbox: Sandbox) -> None:
    warm, real = await compare(sandbox, "@PY killed.py")
    assert warm.exit_code == real.exit_code == 143


async def test_pytest_runs_and_its_exit_code_counts(sandbox: Sandbox) -> None:
    await sandbox.write("/work/test_ok.py", b"def test_ok():\n    assert 1 + 1 == 2\n")
    await sandbox.write("/work/test_bad.py", b"def test_bad():\n    assert [1] == [2]\n")
    good = await bash(sandbox, "python3 -m pytest -q test_ok.py")
    bad = await bash(sandbox, "python3 -m pytest -q")
    none = await bash(sandbox, "python3 -m pytest -q none.py")
    assert (good.exit_code, bad.exit_code, none.exit_code) == (0, 1, 4)
    assert b"1 passed" in good.stdout
    assert b"assert [1] == [2]" in bad.stdout
    assert b"1 failed, 1 passed" in bad.stdout


async def test_what_one_run_does_the_next_does_not_see(sandbox: Sandbox) -> None:
    await output(sandbox, 'python3 -c \'import json, os; json.X = 1; os.environ["Y"] = "1"\'')
    source = "import json, os, random; print(hasattr(json, 'X'), 'Y' in os.environ)"
    assert await output(sandbox, f"python3 -c {shlex.quote(source)}") == "False False"
    draws = [
        await output(sandbox, "python3 -c 'import random; print(random.random())'") for _ in "ab"
    ]
    assert draws[0] != draws[1]


async def test_when_its_caller_is_killed_it_dies(sandbox: Sandbox) -> None:
    source = "import time; print('x', file=open('pid', 'w')); time.sleep(2); open('late', 'w')"
    result = await bash(sandbox, f"timeout -s KILL 0.5 python3 -c {shlex.quote(source)}")
    assert result.exit_code == 137
    assert await output(sandbox, "cat pid; sleep 2.2; ls") == "x\npid"


async def test_output_goes_to_the_caller_every_time(sandbox: Sandbox) -> None:
    lines = await output(
        sandbox, "for n in {1..150}; do python3 -c 'print(1)' || echo failed; done"
    )
    assert lines.split() == ["1"] * 150


async def test_forty_at_once_each_have_their_answer(sandbox: Sandbox) -> None:
    command = 'for n in {1..40}; do python3 -c "print($n)" & done; wait'
    lines = (await output(sandbox, command)).splitlines()
    assert sorted(map(int, lines)) == list(range(1, 41))


async def test_it_is_cheaper_than_starting_python(sandbox: Sandbox) -> None:
    async def seconds(python: str) -> float:
        before = time.perf_counter()
        await output(sandbox, f"for n in 1 2 3 4 5; do {python} -m pytest --version; done")
        return time.perf_counter() - before

    real = f"PYTHONPATH={host.TOOLS}/lib {REAL} -S"
    assert await seconds("python3") < await seconds(real)


async def test_background_python_outlives_its_command_not_the_time_limit(sandbox: Sandbox) -> None:
    await output(
        sandbox, 'python3 -c \'import time; time.sleep(0.3); open("done", "w")\' &>/dev/null &'
    )
    await asyncio.sleep(0.8)
    assert await sandbox.read("/work/done") == b""
