"""What the engines are made from. Heavy imports come only when one is made."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from katcore.config import secret
from katcore.errors import ConfigError
from katcore.protocols import Engine
from katcore.schema.call import ToolCall


class TransformersConfig(BaseModel):
    """Options: the model folder, how many conversations at once, their length in tokens, and on what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    num_slots: int = 64
    context: int = 1024
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"


class VllmConfig(BaseModel):
    """Options: a model folder, and the vLLM server that samples from it.

    `model` is the folder; of a server at `url`, only the tokenizer's files in it are used. `context` bounds
    prompt and answer, in tokens; by default they may be as long as the model takes.

    Of a server that runs elsewhere: `url` is its address; `key` names the environment variable (or
    `airflow:NAME` the Airflow connection) that holds its API key; `served` is the model's name there, if it
    serves several.

    Without `url` a server is started, on loopback with a key of its own: `python` is the interpreter of the
    environment that has vLLM, by default this one; `dtype`, `tensor_parallel_size` and `seed` are vLLM's;
    `arguments` are further ones of its command line; `startup_timeout_s` is how long it may take to be ready;
    `takes_weights` lets it take new weights while it runs, and `sleeps` give its GPUs' memory back, by
    endpoints that every process of this machine can reach, as vLLM guards them with no key. With
    `adapter_rank` it takes adapters of up to that rank, which needs the key. `devices` are its GPUs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    context: int | None = None
    url: str | None = None
    key: str | None = None
    served: str = ""
    python: Path | None = None
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    seed: int = 0
    arguments: tuple[str, ...] = ()
    startup_timeout_s: float = 600.0
    takes_weights: bool = False
    adapter_rank: int = 0
    sleeps: bool = False
    devices: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check_which(self) -> "VllmConfig":
        there, both = {"key", "served"}, {"model", "context", "url"}
        idle = there if self.url is None else type(self).model_fields.keys() - there - both
        if found := sorted(idle & self.model_fields_set):
            which = "without" if self.url is None else "with"
            raise ValueError(f"{', '.join(found)} means nothing {which} url")
        return self


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
        config.model,
        num_slots=config.num_slots,
        context=config.context,
        seed=config.seed,
        device=config.device,
    )
    return engine


def make_vllm(config: VllmConfig) -> Engine:
    """The folder's tokenizer, and a server; it is started when it is opened or first asked."""
    chat = import_module("katcore.inference.chat").ChatTokenizer(config.model)
    module = import_module("katcore.inference.vllm")
    if config.url is None:
        server = _own_server(config)
    else:
        server = module.Elsewhere(config.url, secret(config.key) if config.key else "")
    engine: Engine = module.VllmEngine(server, chat, model=config.served, context=config.context)
    return engine


def _own_server(config: VllmConfig) -> Any:
    if not (config.model / "config.json").is_file():
        raise ConfigError(f"{config.model}: no model folder: it has no config.json")
    module = import_module("katcore.inference.vllm_server")
    arguments = ["--dtype", config.dtype, "--seed", str(config.seed)]
    arguments += ["--tensor-parallel-size", str(config.tensor_parallel_size)]
    if config.context is not None:
        arguments += ["--max-model-len", str(config.context)]
    start = module.Start(
        config.model,
        module.find_python(config.python),
        (*arguments, *config.arguments),
        takes_weights=config.takes_weights,
        adapter_rank=config.adapter_rank,
        sleeps=config.sleeps,
        devices=config.devices,
        timeout_s=config.startup_timeout_s,
    )
    return module.VllmServer(start)


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
