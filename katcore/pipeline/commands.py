"""The command lines that a training comes to, on each machine."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from katcore.config import Preset
from katcore.inference.vllm_server import HOST, Start
from katcore.settings import ScaleSettings

MEET_AT = "HOST:29500"
"""Where processes of several machines meet: an address of the first one, which is the user's to say."""
_PORT = 8000
_GIVEN = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "CUDA_VISIBLE_DEVICES")
"""Of a server's environment, what changes what it does."""
_SERVED = Path("/MODEL")
"""Stands for the model that is sampled: where it lies is known when the stage before is done."""
TRAINS = ("sft", "rl", "distill")
"""Stages that `scale` is about."""
SAMPLES = ("rl", "distill", "evaluate")
"""Stages whose rollouts are of models, by the engines of `serve`."""


def preset_lines(stage: str, name: str, experts: Iterable[str]) -> list[list[str]]:
    """What follows `kat`, for each run of a stage. `name` is the preset's, or its file."""
    line = [stage, "--preset", name]
    if stage in {"base", "distill"}:
        return [line]
    unified = [line] if stage in {"sft", "evaluate"} else []
    return [*([*line, "--expert", expert] for expert in experts), *unified]


def commands(
    preset: Preset, stage: str, lines: Iterable[list[str]]
) -> Mapping[str, tuple[str, ...]]:
    """What runs a stage, by machine, and the servers that make its rollouts."""
    scale = preset.scale if stage in TRAINS else ScaleSettings()
    every = tuple(shlex.join(launched(scale, line)) for line in lines)
    found = {f"node {node}": every for node in range(scale.nodes)}
    if stage in SAMPLES and (servers := tuple(server_lines(preset, stage))):
        found["to be started" if preset.serve.urls else "started by node 0"] = servers
    return found


def launched(scale: ScaleSettings, line: Iterable[str]) -> list[str]:
    """One run of `kat`, which starts the processes of one machine itself."""
    if scale.nodes == 1:
        return ["kat", *line]
    spread = ["--nnodes", str(scale.nodes), "--nproc-per-node", str(scale.processes)]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", MEET_AT]
    return ["torchrun", *spread, *meet, "-m", "katcore.cli", *line]


def server_lines(preset: Preset, stage: str) -> Iterator[str]:
    """The command line of each vLLM server of a stage, less its key; none if there are none."""
    serve = preset.serve
    if serve.engine != "vllm":
        return
    for number in range(serve.replicas):
        start = _start(preset, number, is_trained=stage != "evaluate" or bool(serve.urls))
        if serve.urls:
            url = urlsplit(serve.urls[number])
            command = start.command(url.port or _PORT)
            command[command.index(HOST)] = url.hostname or HOST
        else:
            command = start.command(_PORT + number)
        environment = start.environment("")
        given = [f"{name}={environment[name]}" for name in _GIVEN if name in environment]
        yield " ".join([*given, shlex.join(command)])


def num_gpus(preset: Preset) -> int:
    """How many GPUs a machine has to have, which runs the trainer and the servers that it starts."""
    serve, num = preset.serve, preset.scale.gpus
    if serve.engine != "vllm" or serve.urls:
        return num
    servers = (serve.devices_of(number, num) for number in range(serve.replicas))
    return max(num, 1 + max(device for devices in servers for device in devices))


def _start(preset: Preset, number: int, *, is_trained: bool) -> Start:
    """One replica's server, as `katcore.pipeline.engines` has it started; at urls, one for all stages."""
    serve, lora = preset.serve, preset.lora
    arguments = (
        *("--dtype", str(serve.options.get("dtype", "auto")), "--seed", str(number)),
        *("--tensor-parallel-size", str(serve.tensor_parallel)),
        *("--max-model-len", str(preset.model.context)),
        *map(str, serve.options.get("arguments", ())),
    )
    return Start(
        _SERVED,
        Path("python"),
        arguments,
        takes_weights=is_trained and lora is None,
        adapter_rank=lora.rank if lora and is_trained else 0,
        sleeps=is_trained and serve.placement == "colocated",
        devices=() if serve.urls else serve.devices_of(number, preset.scale.gpus),
    )
