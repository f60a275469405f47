"""The `mini` scaffold: a bash loop. One answer is one command, its output is the next message.

The shape is mini-swe-agent's (https://github.com/SWE-agent/mini-swe-agent): no tool schema, no state but
the sandbox. It runs beside the proxy, and every command runs in the sandbox.
"""

import asyncio
import re

import aiohttp
from pydantic import BaseModel, ConfigDict, Field

from katcore.errors import SandboxTimeoutError, ScaffoldError
from katcore.protocols import Sandbox
from katcore.schema.rollout import ExecResult, ModelEndpoint

_FENCE = re.compile(r"```(?:bash|sh)?\s*\n(.*?)\n?```", re.DOTALL)
_SUBMIT = "submit"
_STOPS = {"budget_exhausted": "budget", "context_length_exceeded": "length"}
"""Codes of an answer that is none, and why the agent ends then."""


class MiniConfig(BaseModel):
    """Options of the mini scaffold. Output beyond `max_output_chars` is cut in its middle.

    After `max_repeats` turns with the same command and the same output it ends: the agent is stuck.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_turns: int = 6
    max_repeats: int = Field(default=3, ge=2)
    max_output_chars: int = 240
    command_timeout_s: float = 10.0


class MiniScaffold:
    """Asks the model for a command, runs it, shows the output; until `submit` or a limit."""

    def __init__(self, config: MiniConfig) -> None:
        self._config = config

    async def run(self, prompt: str, sandbox: Sandbox, endpoint: ModelEndpoint) -> ExecResult:
        """See `Scaffold.run`. `stderr` is `submitted`, `turns`, `stuck`, `length` or `budget`.

        Raises:
            ScaffoldError: the model endpoint answered with something that is no chat completion.
        """
        messages = [{"role": "user", "content": prompt}]
        last, num_same = ("", ""), 0
        async with aiohttp.ClientSession(headers=_headers(endpoint)) as client:
            for _ in range(self._config.max_turns):
                answer, finish = await _ask(client, endpoint, messages)
                if finish in _STOPS:
                    return _ended(_STOPS[finish])
                command = _command(answer)
                if command == _SUBMIT:
                    return _ended("submitted")
                if finish == "length":
                    return _ended("length")
                output = await self._execute(sandbox, command)
                num_same = num_same + 1 if last == (command, output) else 1
                last = command, output
                if num_same == self._config.max_repeats:
                    return _ended("stuck")
                messages += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": output},
                ]
        return _ended("turns")

    async def _execute(self, sandbox: Sandbox, command: str) -> str:
        timeout_s = self._config.command_timeout_s
        try:
            result = await sandbox.exec(["bash", "-c", command], timeout_s=timeout_s)
        except SandboxTimeoutError:
            return f"[timeout {timeout_s:g} s]"
        except ValueError as error:
            return f"[not a command: {error}]"
        return render(result, self._config.max_output_chars)


def render(result: ExecResult, max_chars: int) -> str:
    """What the model is shown of a command: its output, `[exit N]` before it if N is not 0."""
    text = (result.stdout + result.stderr).decode(errors="replace").strip()
    if len(text) > max_chars:
        half = max_chars // 2
        text = f"{text[:half]}\n[...]\n{text[-half:]}"
    if result.exit_code:
        text = f"[exit {result.exit_code}]\n{text}".strip()
    return text or "ok"


def _command(answer: str) -> str:
    fenced = _FENCE.search(answer)
    return (fenced.group(1) if fenced else answer).strip()


def _ended(reason: str) -> ExecResult:
    return ExecResult(0, b"", reason.encode())


def _headers(endpoint: ModelEndpoint) -> dict[str, str]:
    return {"Authorization": f"Bearer {endpoint.api_key}"}


async def _ask(
    client: aiohttp.ClientSession, endpoint: ModelEndpoint, messages: list[dict[str, str]]
) -> tuple[str, str]:
    """The answer and why it ended; asks again where the endpoint is busy."""
    body = {"model": endpoint.model, "messages": messages}
    url = f"{endpoint.base_url}/v1/chat/completions"
    try:
        while True:
            async with client.post(url, json=body) as response:
                content = await response.json()
                if response.status == 200:
                    choice = content["choices"][0]
                    return choice["message"]["content"], choice["finish_reason"]
                error = content["error"]
                if error["code"] in _STOPS:
                    return "", error["code"]
                if response.status != 429:
                    raise ScaffoldError(f"HTTP {response.status}: {error['message']}")
                await asyncio.sleep(float(response.headers.get("Retry-After", 1)))
    except (aiohttp.ClientError, LookupError, TypeError, ValueError) as error:
        raise ScaffoldError(f"no chat completion from the endpoint: {error!r}") from error
