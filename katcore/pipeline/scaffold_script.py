"""The model's part in `kat scaffolds check`: calls whatever shell and sub-agent tools the scaffold offers.

An agent that has no tools but takes edits as text is given those.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from katcore.errors import EngineBusyError, EngineError
from katcore.inference.chat import ChatTokenizer
from katcore.inference.scripted import ScriptedEngine, Turn
from katcore.proxy.session import Budget
from katcore.schema.call import EngineRequest, Tool, ToolCall

PROMPT = "Write the word hello into a file named hello.txt, then show it."
MAX_CALLS = 3
"""Of the scene in which the budget is too small."""
_SHELLS = ("Bash", "bash", "run_commands", "exec", "exec_command", "execute_command", "shell",
           "run_shell_command")  # fmt: skip
AGENTS = {"Agent": "general-purpose", "Task": "general-purpose", "task": "general", "spawn_agent": "",
           "agent": "general-purpose"}  # fmt: skip
_TEXT_TOOL = Tool("bash", "", '{"properties": {"command": {"type": "string"}}}')
"""What a scaffold without tools takes as text."""
_SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
"""What mini-SWE-agent wants to see echoed; it takes no text for an end."""
_INNER = "Look around in this folder and report what is there."
_TITLE = "A greeting"
_EDIT = "{name}\n<<<<<<< SEARCH\n{before}=======\n{after}>>>>>>> REPLACE\n"
"""How aider takes an edit; its prompt has examples of it."""

_MISFITS = 2

Script = Callable[[EngineRequest, int], Turn]
"""What to answer to a request when so many answers were given since the task was."""


class Player(ScriptedEngine):
    """Answers as the script says. Without tools, the shell is text."""

    def __init__(self, chat: ChatTokenizer, script: Script, *, has_tools: bool) -> None:
        super().__init__(chat, ())
        self._script = script
        self._has_tools = has_tools

    def _turn(self, request: EngineRequest) -> Turn:
        messages = request.messages
        # Some prompts have examples of a conversation before the task.
        asked = (
            n for n, item in enumerate(messages) if item.role == "user" and PROMPT in item.content
        )
        since = messages[next(asked, 0) :]
        number = sum(message.role == "assistant" for message in since)
        if self._has_tools:
            return self._script(request, number)
        said = self._script(replace(request, tools=(_TEXT_TOOL,)), number)
        return "submit" if isinstance(said, str) else json.loads(said[0].arguments)["command"]


def call_of(tool: Tool, **known: Any) -> tuple[ToolCall, ...]:
    """A call of a tool with what it requires; values it does not name are made up from its schema."""
    schema = json.loads(tool.parameters)
    arguments: dict[str, Any] = {}
    for name, about in schema.get("properties", {}).items():
        if name in known:
            arguments[name] = known[name]
        elif name in schema.get("required", ()):
            arguments[name] = _made_up(about)
    return (ToolCall("", tool.name, json.dumps(arguments)),)


def _made_up(about: dict[str, Any]) -> Any:
    if about.get("enum"):
        return about["enum"][0]
    simple = {"integer": 1, "number": 1, "boolean": False, "array": [], "object": {}}
    return simple.get(about.get("type", "string"), "a step")


def shell(request: EngineRequest, command: str) -> Turn:
    """A call of the shell that is offered; where none is, the request is one for a title."""
    for name in _SHELLS:
        for tool in request.tools:
            if tool.name == name:
                return call_of(tool, command=command, cmd=command, commands=[command])
    return _TITLE


def _takes_edits(request: EngineRequest) -> bool:
    return any("<<<<<<< SEARCH" in message.content for message in request.messages)


def _edit(number: int) -> Turn:
    """The third time it fits: what does not is sent back, which makes a conversation of it."""
    if number < _MISFITS:
        return _EDIT.format(name="README.md", before=f"no such line {number}\n", after="another\n")
    return _EDIT.format(name="hello.txt", before="", after="hello\n")


def _work(request: EngineRequest, number: int) -> Turn:
    if _takes_edits(request):
        return _edit(number)
    steps = ["echo hello > hello.txt", "cat hello.txt"]
    if any(_SUBMIT in message.content for message in request.messages):
        steps.append(f"echo {_SUBMIT}")
    return shell(request, steps[number]) if number < len(steps) else "Done."


def _delegate(request: EngineRequest, number: int) -> Turn:
    """Main: start a sub-agent, then work. Sub-agent: look around, and report."""
    said = [message.content for message in request.messages if message.role == "user"]
    is_inner = any(_INNER in text for text in said[:2]) and "hello.txt" not in "".join(said[:2])
    if is_inner:
        return shell(request, "ls") if number == 0 else "There is a README.md in this folder."
    offered = next((tool for tool in request.tools if tool.name in AGENTS), None)
    if offered is None:
        return _work(request, number)
    if number == 0:
        kind = AGENTS[offered.name]
        texts = {"prompt": _INNER, "task": _INNER, "description": "look around"}
        return call_of(offered, **texts, **({"subagent_type": kind} if kind else {}))
    return _work(request, number - 1)


def _endless(request: EngineRequest, number: int) -> Turn:
    if _takes_edits(request):
        return _edit(min(number, _MISFITS - 1))
    return shell(request, f"echo {number}")


class _Busy:
    """Too busy for the first request of the conversation that works."""

    def __init__(self) -> None:
        self._is_over = False

    def __call__(self, request: EngineRequest, number: int) -> Turn:
        if (request.tools or _takes_edits(request)) and not self._is_over:
            self._is_over = True
            raise EngineBusyError("the engine is busy", 1.0)
        return _work(request, number)


def _broken(request: EngineRequest, number: int) -> Turn:
    if number:
        raise EngineError("the engine is gone")
    return _work(request, number)


_PLENTY = Budget(max_calls=60, max_tokens=1 << 20)


def scenes() -> dict[str, tuple[Script, Budget]]:
    """What is played, and what the rollout may spend."""
    return {
        "work": (_work, _PLENTY),
        "sub-agent": (_delegate, _PLENTY),
        "budget": (_endless, Budget(max_calls=MAX_CALLS, max_tokens=1 << 20)),
        "busy": (_Busy(), _PLENTY),
        "engine error": (_broken, _PLENTY),
    }
