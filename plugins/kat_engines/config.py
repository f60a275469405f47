"""What the engines are made from. Heavy imports come only when one is made."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from katcore.config import secret
from katcore.errors import ConfigError
from katcore.protocols import Engine
from katcore.schema.call import ToolCall


class TransformersConfig(BaseModel):
    """Options: the model folder, how many conversations at once, and their length in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    num_slots: int = 64
    context: int = 1024
    seed: int = 0


class UpstreamConfig(BaseModel):
    """Options: whose API it is, the model there, and where its key is.

    `key` names an environment variable, or `airflow:NAME` an Airflow connection; never a key itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    api: Literal["openai", "anthropic"]
    model: str
    key: str
    base_url: str | None = None


class ScriptedCall(BaseModel):
    """A tool call of a script."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tool: str
    arguments: dict[str, Any] = {}


class ScriptedConfig(BaseModel):
    """Options: the turns to say, one after the other, whatever is asked: a text, or a tool call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    turns: tuple[str | ScriptedCall, ...]


def make_transformers(config: TransformersConfig) -> Engine:
    """Load the folder."""
    if not (config.model / "config.json").is_file():
        raise ConfigError(f"{config.model}: no model folder: it has no config.json")
    engine: Engine = import_module("katcore.inference.embedded").open_engine(
        config.model, num_slots=config.num_slots, context=config.context, seed=config.seed
    )
    return engine


def make_upstream(config: UpstreamConfig) -> Engine:
    """A client with the key from the environment."""
    engine: Engine = import_module("katcore.inference.upstream").UpstreamEngine(
        config.api, config.base_url, config.model, secret(config.key)
    )
    return engine


def make_scripted(config: ScriptedConfig) -> Engine:
    """The script, in ids of bytes."""
    chat = import_module("katcore.inference.bytes").byte_chat()
    turns = [
        turn if isinstance(turn, str) else (ToolCall("", turn.tool, json.dumps(turn.arguments)),)
        for turn in config.turns
    ]
    engine: Engine = import_module("katcore.inference.scripted").ScriptedEngine(chat, turns)
    return engine
