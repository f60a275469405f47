"""How each coding agent is installed, pointed at the proxy, and run without asking anybody anything.

Every line was seen to matter with the version named here; docs/reference/scaffolds.md has the matrix.
"""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from katcore.scaffold.command import CommandConfig

_MODEL = {
    "name": "${model}",
    "tool_call": True,
    "limit": {"context": "${context}", "output": "${output}"},
}


class AgentConfig(BaseModel):
    """Options of an installed agent: its release, how long it may work, the model's window and answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str = ""
    timeout_s: float = Field(default=3600.0, gt=0)
    context: int = Field(default=131072, ge=1)
    output: int = Field(default=8192, ge=1)


def _json(value: Any) -> str:
    """JSON in which numbers of the rollout stand without quotes."""
    text = json.dumps(value)
    for name in ("context", "output"):
        text = text.replace(f'"${{{name}}}"', f"${{{name}}}")
    return text


def _opencode(schema: str) -> str:
    """OpenCode's and Kilo's configuration; no provider of theirs may be named `openai` or `opencode`."""
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "katcore",
        "options": {"baseURL": "${base_url}/v1", "apiKey": "${api_key}"},
        "models": {"${model}": _MODEL},
    }
    return _json(
        {
            "$schema": schema,
            "autoupdate": False,
            "share": "disabled",
            "permission": "allow",
            "model": "katcore/${model}",
            "small_model": "katcore/${model}",
            "provider": {"katcore": provider},
        }
    )


_CLAUDE_CODE = CommandConfig(
    npm={"@anthropic-ai/claude-code": "2.1.330"},
    command=(
        "claude", "-p", "${prompt}", "--dangerously-skip-permissions", "--output-format", "json",
    ),
    env={
        "ANTHROPIC_BASE_URL": "${base_url}",
        "ANTHROPIC_AUTH_TOKEN": "${api_key}",
        "ANTHROPIC_MODEL": "${model}",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "${model}",
        "ANTHROPIC_DEFAULT_SONNET_MODEL": "${model}",
        "ANTHROPIC_DEFAULT_OPUS_MODEL": "${model}",
        "CLAUDE_CODE_SUBAGENT_MODEL": "${model}",
        # As root it refuses to work without asking, unless it knows that it is in a sandbox.
        "IS_SANDBOX": "1",
        # A block of the system prompt that changes from call to call.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "${output}",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
    },
)  # fmt: skip

_OPENCODE = CommandConfig(
    npm={"opencode-ai": "1.18.33"},
    # Without a title it asks the model for one.
    command=("opencode", "run", "--format", "json", "--title", "task", "${prompt}"),
    files={"~/opencode.json": _opencode("https://opencode.ai/config.json")},
    env={
        "OPENCODE_CONFIG": "/tmp/home/opencode.json",
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
        "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    },
)

_KILO_CODE = CommandConfig(
    # 7.8.1 lacks its platform package.
    npm={"@kilocode/cli": "7.7.7"},
    command=("kilo", "run", "--format", "json", "${prompt}"),
    files={"~/kilo.json": _opencode("https://opencode.ai/config.json")},
    env={
        "KILO_CONFIG": "/tmp/home/kilo.json",
        "KILO_DISABLE_AUTOUPDATE": "1",
        "KILO_DISABLE_MODELS_FETCH": "1",
        "KILO_DISABLE_LSP_DOWNLOAD": "1",
        "KILO_DISABLE_DEFAULT_PLUGINS": "1",
        "KILO_TELEMETRY_LEVEL": "off",
    },
)

_CLINE = CommandConfig(
    npm={"cline": "3.0.65"},
    command=("cline", "--json", "${prompt}"),
    files={
        "~/.cline/data/settings/providers.json": _json(
            {
                "version": 1,
                "lastUsedProvider": "openai-compatible",
                "providers": {
                    "openai-compatible": {
                        "settings": {
                            "provider": "openai-compatible",
                            "apiKey": "${api_key}",
                            "model": "${model}",
                            "baseUrl": "${base_url}/v1",
                        },
                        "updatedAt": "2026-01-01T00:00:00.000Z",
                        "tokenSource": "manual",
                    }
                },
            }
        ),
        "~/.cline/data/settings/global-settings.json": _json(
            {"telemetryOptOut": True, "autoUpdateEnabled": False}
        ),
    },
    # Without it, a daemon outlives the run.
    env={"CLINE_SESSION_BACKEND_MODE": "local", "CLINE_NO_AUTO_UPDATE": "1"},
)

_OPENCLAW = CommandConfig(
    npm={"openclaw": "2026.9.6", "node": "24.21.0"},
    command=(
        "bash", "-c",
        'exec openclaw agent exec --config ~/openclaw.json --cwd "$PWD" --json --timeout 3600 "$0"',
        "${prompt}",
    ),
    files={
        "~/openclaw.json": _json(
            {
                "models": {
                    "mode": "replace",
                    "providers": {
                        "katcore": {
                            "baseUrl": "${base_url}/v1",
                            "apiKey": "${api_key}",
                            "api": "openai-responses",
                            "models": [
                                {
                                    "id": "${model}",
                                    "name": "${model}",
                                    "reasoning": False,
                                    "input": ["text"],
                                    "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
                                    "contextWindow": "${context}",
                                    "maxTokens": "${output}",
                                }
                            ],
                        }
                    },
                },
                "agents": {"defaults": {"model": {"primary": "katcore/${model}"}}},
            }
        )
    },
)  # fmt: skip

_CODEX = CommandConfig(
    npm={"@openai/codex": "0.169.0"},
    command=(
        "codex", "exec", "--dangerously-bypass-approvals-and-sandbox", "--skip-git-repo-check", "--json",
        "${prompt}",
    ),
    files={
        "~/.codex/config.toml": """\
model = "${model}"
model_provider = "katcore"
model_context_window = ${context}
check_for_update_on_startup = false
[analytics]
enabled = false
[model_providers.katcore]
name = "katcore"
base_url = "${base_url}/v1"
wire_api = "responses"
env_key = "KATCORE_KEY"
"""
    },
    env={"KATCORE_KEY": "${api_key}"},
)  # fmt: skip

_QWEN_CODE = CommandConfig(
    npm={"@qwen-code/qwen-code": "0.24.4", "node": "24.21.0"},
    command=("qwen", "--yolo", "--auth-type", "openai", "--output-format", "json", "-p", "${prompt}"),
    files={
        "~/.qwen/settings.json": _json(
            {"general": {"disableAutoUpdate": True}, "privacy": {"usageStatisticsEnabled": False}}
        )
    },
    env={
        "OPENAI_API_KEY": "${api_key}",
        "OPENAI_BASE_URL": "${base_url}/v1",
        "OPENAI_MODEL": "${model}",
        "QWEN_CODE_MAX_OUTPUT_TOKENS": "${output}",
        "QWEN_TELEMETRY_ENABLED": "0",
    },
)  # fmt: skip

_GEMINI_CLI = CommandConfig(
    npm={"@google/gemini-cli": "0.61.0"},
    command=(
        "gemini", "--yolo", "-m", "${model}", "--output-format", "json", "-p", "${prompt}",
    ),
    files={
        "~/.gemini/settings.json": _json(
            {
                "general": {"enableAutoUpdate": False, "disableAutoUpdate": True},
                "privacy": {"usageStatisticsEnabled": False},
                "telemetry": {"enabled": False},
                "security": {"auth": {"selectedType": "gemini-api-key"}},
            }
        )
    },
    env={
        "GEMINI_API_KEY": "${api_key}",
        "GOOGLE_GEMINI_BASE_URL": "${base_url}",
        "GEMINI_CLI_TRUST_WORKSPACE": "true",
    },
)  # fmt: skip

_MINI_SWE_AGENT = CommandConfig(
    # Without mcp, its client for models repeats an import error for ever.
    pypi={"mini-swe-agent": "2.4.6", "mcp": "1.22.0"},
    command=(
        "python3", "/opt/scaffold/run.py", "minisweagent.run.mini", "-y", "--exit-immediately",
        "-m", "openai/${model}", "-c", "mini.yaml", "-o", "/tmp/home/trajectory.json", "-t", "${prompt}",
    ),
    env={
        "OPENAI_API_KEY": "${api_key}",
        "OPENAI_API_BASE": "${base_url}/v1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "MSWEA_CONFIGURED": "true",
        "MSWEA_COST_TRACKING": "ignore_errors",
        "MSWEA_GLOBAL_CONFIG_DIR": "/tmp/home/mini",
        # By default it repeats a refused request for minutes.
        "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "3",
        "MSWEA_SILENT_STARTUP": "1",
    },
)  # fmt: skip

_AIDER = CommandConfig(
    pypi={"aider-chat": "0.86.2"},
    command=(
        "python3", "/opt/scaffold/run.py", "aider", "--model", "openai/${model}", "--edit-format", "diff",
        "--yes-always", "--no-check-update", "--no-show-release-notes", "--no-show-model-warnings",
        "--analytics-disable", "--no-gitignore", "--no-pretty", "--no-detect-urls", "--no-browser",
        "--no-auto-commits", "--chat-history-file", "/tmp/home/chat.md", "--input-history-file",
        "/tmp/home/input", "--message", "${prompt}",
    ),
    env={
        "OPENAI_API_KEY": "${api_key}",
        "OPENAI_API_BASE": "${base_url}/v1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    },
)  # fmt: skip

RECIPES: dict[str, tuple[CommandConfig, str]] = {
    "claude-code": (_CLAUDE_CODE, "Anthropic's agent, over Anthropic Messages"),
    "opencode": (_OPENCODE, "OpenCode, over Chat Completions"),
    "kilo-code": (_KILO_CODE, "Kilo Code, over Chat Completions"),
    "cline": (_CLINE, "Cline, over Chat Completions"),
    "openclaw": (_OPENCLAW, "OpenClaw, over Responses"),
    "codex": (_CODEX, "OpenAI's Codex CLI, over Responses"),
    "qwen-code": (_QWEN_CODE, "Qwen Code, over Chat Completions"),
    "gemini-cli": (_GEMINI_CLI, "Google's Gemini CLI, over the Gemini API"),
    "mini-swe-agent": (_MINI_SWE_AGENT, "mini-SWE-agent, over Chat Completions"),
    "aider": (_AIDER, "aider, over Chat Completions; it edits by text"),
}


def recipe(name: str, config: AgentConfig) -> CommandConfig:
    """The agent's command, with the options of a run."""
    known = RECIPES[name][0]
    options: dict[str, Any] = config.model_dump(exclude={"version"})
    if config.version:
        source = "npm" if known.npm else "pypi"
        packages = getattr(known, source)
        options[source] = {**packages, next(iter(packages)): config.version}
    return known.model_copy(update=options)
