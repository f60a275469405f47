"""Installing packages: once, whole or not at all, and exactly the version asked for."""

import asyncio
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from katcore.errors import ScaffoldError
from katcore.scaffold.install import install_npm, install_pypi

# Stands in for npm: notes its arguments, and installs what NPM_GIVES says, or what it was asked for.
_NPM = """#!/bin/bash
echo "$@" >> "$NPM_LOG"
echo "$PATH" | cut -d: -f1 >> "$NPM_LOG.path"
[ -z "$NPM_FAILS" ] || { echo "npm error: $NPM_FAILS" >&2; exit 1; }
while [ $# -gt 0 ]; do
  case "$1" in
    --prefix) prefix=$2; shift 2 ;;
    *@*) name=${1%@*}; version=${NPM_GIVES:-${1##*@}}; mkdir -p "$prefix/node_modules/$name"
         echo "{\\"version\\": \\"$version\\"}" > "$prefix/node_modules/$name/package.json"; shift ;;
    *) shift ;;
  esac
done
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "npm").write_text(_NPM)
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("NPM_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def asked(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


async def test_it_is_installed_once(tmp_path: Path, log: Path) -> None:
    said: list[str] = []
    packages = {"@maker/agent": "1.2.3"}
    first = await install_npm(tmp_path / "s", "agent", packages, said.append)
    assert first.name.startswith("agent-1.2.3-")
    assert folders(first / "node_modules") == ["@maker"]
    assert await install_npm(tmp_path / "s", "agent", packages, said.append) == first
    assert said == ["installing @maker/agent 1.2.3"]
    assert len(asked(log)) == 1
    other = await install_npm(tmp_path / "s", "agent", {"@maker/agent": "1.2.4"}, said.append)
    assert other != first


async def test_many_at_once_install_once(tmp_path: Path, log: Path) -> None:
    made = await asyncio.gather(
        *(install_npm(tmp_path / "s", "agent", {"a": "1.0.0"}, print) for _ in range(5))
    )
    assert len({*made}) == len(asked(log)) == 1


async def test_its_own_node_comes_first_and_installs_the_rest(tmp_path: Path, log: Path) -> None:
    packages = {"agent": "1.0.0", "node": "24.1.0"}
    folder = await install_npm(tmp_path / "s", "agent", packages, lambda _: None)
    first, second = asked(log)
    assert "node@24.1.0" in first
    assert "agent@1.0.0" not in first
    assert "agent@1.0.0" in second
    assert asked(log.with_name("log.path"))[1].endswith("node_modules/.bin")
    assert folders(folder / "node_modules") == ["agent", "node"]
    assert packages == {"agent": "1.0.0", "node": "24.1.0"}


async def test_another_version_than_asked_for_is_refused(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPM_GIVES", "0.0.1")
    with pytest.raises(ScaffoldError, match=r"installed agent 0\.0\.1 where 2\.0\.0 was asked for"):
        await install_npm(tmp_path / "s", "agent", {"agent": "2.0.0"}, lambda _: None)
    assert not folders(tmp_path / "s")


async def test_a_failure_says_what_npm_said_and_leaves_nothing(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPM_FAILS", "no space left")
    with pytest.raises(ScaffoldError, match=r"agent@2\.0\.0: npm error: no space left"):
        await install_npm(tmp_path / "s", "agent", {"agent": "2.0.0"}, lambda _: None)
    assert not folders(tmp_path / "s")
    monkeypatch.delenv("NPM_FAILS")
    assert await install_npm(tmp_path / "s", "agent", {"agent": "2.0.0"}, lambda _: None)


async def test_without_npm_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ScaffoldError, match=r"install Node\.js"):
        await install_npm(tmp_path / "s", "agent", {"agent": "2.0.0"}, lambda _: None)


async def test_what_a_module_of_pypi_starts_sees_none_of_its_packages(tmp_path: Path) -> None:
    """With the real installer: a wheel made here, and no index."""
    wheel(tmp_path / "wheels")
    packages = {"katcore-sample-agent": "1.2.3"}
    flags = {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(tmp_path / "wheels")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in flags.items():
            patch.setenv(name, value)
        folder = await install_pypi(tmp_path / "s", "agent", packages, lambda _: None)
        with pytest.raises(ScaffoldError, match=r"could not install katcore-sample-agent==9\.9\.9"):
            await install_pypi(
                tmp_path / "s", "agent", {"katcore-sample-agent": "9.9.9"}, lambda _: None
            )
    assert folders(tmp_path / "s") == [folder.name]
    assert output(sys.executable, folder / "run.py", "sample_agent", "--go") == "--go 1\n"


def output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


def wheel(folder: Path) -> None:
    """An agent that prints its arguments, and how a child of it fails to import it."""
    code = (
        "import subprocess, sys\nchild = [sys.executable, '-c', 'import sample_agent']\n"
        "print(*sys.argv[1:], subprocess.run(child, stderr=subprocess.DEVNULL).returncode)\n"
    )
    info = "katcore_sample_agent-1.2.3.dist-info"
    files = {
        "sample_agent/__init__.py": "",
        "sample_agent/__main__.py": code,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: katcore-sample-agent\nVersion: 1.2.3\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir()
    with zipfile.ZipFile(folder / "katcore_sample_agent-1.2.3-py3-none-any.whl", "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
