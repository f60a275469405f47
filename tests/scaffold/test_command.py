"""A scaffold that is a command line: what it is told, where it runs, and why it ended."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kat_scaffolds.recipe import RECIPES, AgentConfig, recipe
from katcore.errors import SandboxTimeoutError, ScaffoldError
from katcore.plugin import Plugins
from katcore.protocols import RunsInside
from katcore.scaffold import command
from katcore.scaffold.command import HOME, CommandConfig, CommandScaffold
from katcore.schema.rollout import ExecResult, ModelEndpoint

ENDPOINT = ModelEndpoint("http://host:1", "kat-key", "policy", "http://127.0.0.1:8823")


class RecordingSandbox:
    """Notes what it is asked, and answers with what it was given."""

    def __init__(self, result: ExecResult | Exception) -> None:
        self.result = result
        self.files: dict[str, str] = {}
        self.asked: dict[str, Any] = {}

    async def exec(self, argv: Any, **options: Any) -> ExecResult:
        self.asked = {"argv": list(argv), **options}
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    async def read(self, path: str) -> bytes:
        return self.files[path].encode()

    async def write(self, path: str, data: bytes) -> None:
        self.files[path] = data.decode()


async def run(config: CommandConfig, result: ExecResult | Exception, prompt: str = "fix") -> Any:
    sandbox = RecordingSandbox(result)
    ended = await CommandScaffold(config, "agent").run(prompt, sandbox, ENDPOINT)
    return sandbox, ended


async def test_what_a_rollout_says_is_put_in_and_other_dollars_stay() -> None:
    config = CommandConfig(
        command=("agent", "-p", "${prompt}", "$HOME"),
        env={"URL": "${base_url}/v1", "KEY": "${api_key}", "MODEL": "${model}"},
        files={"~/a.json": '{"$schema": "x", "n": ${context}}', "/etc/agent": "${output}"},
        context=9,
        output=3,
        timeout_s=7,
    )
    prompt = 'it\'s ${model} "now"\n$(rm -rf /)'
    sandbox, ended = await run(config, ExecResult(0, b"said", b""), prompt)
    assert sandbox.files == {f"{HOME}/a.json": '{"$schema": "x", "n": 9}', "/etc/agent": "3"}
    argv = sandbox.asked["argv"]
    assert argv[:2] == ["bash", "-c"]
    assert argv[3:] == ["agent", "agent", "-p", prompt, "$HOME"]
    assert sandbox.asked["timeout_s"] == 7
    assert sandbox.asked["env"] == {
        "HOME": HOME, "URL": "http://127.0.0.1:8823/v1", "KEY": "kat-key", "MODEL": "policy",
    }  # fmt: skip
    assert (ended.exit_code, ended.stdout, ended.stderr) == (0, b"said", b"exit 0")


async def test_why_it_ended_is_said() -> None:
    config = CommandConfig(command=("agent",))
    _, ended = await run(config, ExecResult(3, b"x" * 400, b"no such model\n"))
    assert ended.stderr.startswith(b"exit 3: x")
    assert ended.stderr.endswith(b"no such model")
    _, ended = await run(config, SandboxTimeoutError("agent: ran past its 7 s"))
    assert (ended.exit_code, ended.stderr) == (-1, b"time")


async def test_without_a_door_it_says_so() -> None:
    scaffold = CommandScaffold(CommandConfig(command=("agent",)))
    endpoint = ModelEndpoint("http://host:1", "kat-key", "policy")
    with pytest.raises(ScaffoldError, match="no door"):
        await scaffold.run("fix", RecordingSandbox(ExecResult(0, b"", b"")), endpoint)


async def test_without_packages_there_is_nothing_to_install() -> None:
    scaffold = CommandScaffold(CommandConfig(command=("agent",), memory_mib=700))
    done = await scaffold.install(lambda _: None)
    assert (done.version, done.tools, done.memory_mib) == ("", None, 700)


@pytest.mark.parametrize("name", RECIPES)
def test_every_agent_is_pinned_and_told_where_the_model_is(name: str) -> None:
    config = recipe(name, AgentConfig(context=4096, output=512))
    source = "npm" if config.npm else "pypi"
    (package, version), *others = getattr(config, source).items()
    assert version[0].isdigit()
    everything = " ".join([*config.env.values(), *config.files.values()])
    assert "${base_url}" in everything
    assert "${api_key}" in everything
    assert any("${prompt}" in part for part in config.command)
    other = recipe(name, AgentConfig(version="1.2.3"))
    assert dict(getattr(other, source)) == {package: "1.2.3", **dict(others)}
    made = Plugins.installed().make("scaffold", name, {"timeout_s": 5})
    assert isinstance(made, RunsInside)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"command": []},
        {"command": ["a"], "timeout_s": 0},
        {"command": ["a"], "npm": {"a": "1"}, "pypi": {"a": "1"}},
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CommandConfig.model_validate(options)


async def test_it_is_installed_once_under_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    async def install(root: Path, name: str, packages: Any, report: Any) -> Path:
        seen.append((root, name, dict(packages)))
        return root / "there"

    root = home_in(tmp_path, monkeypatch) / "scaffolds"
    monkeypatch.setattr(command, "install_npm", install)
    scaffold = CommandScaffold(CommandConfig(command=("a",), npm={"agent": "1.2.3"}), "my-agent")
    done = await scaffold.install(lambda _: None)
    assert (done.version, done.tools) == ("1.2.3", root / "there")
    assert seen == [(root, "my-agent", {"agent": "1.2.3"})]


def home_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATCORE_HOME", str(folder))
    return folder.resolve()
