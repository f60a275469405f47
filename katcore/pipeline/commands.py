"""The command lines that a training comes to, on each machine."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from katcore.config import Preset
from katcore.inference.vllm_server import HOST, Start
from katcore.serving import ServeSettings
from katcore.settings import ScaleSettings

MEET_AT = "HOST:29500"
"""Where processes of several machines meet: an address of the first one, which is the user's to say."""
_PORT = 8000
_SERVED = Path("/MODEL")
"""Stands for the model that is trained: where it lies is known when the stage before is done."""


def preset_lines(stage: str, name: str, experts: Iterable[str]) -> list[list[str]]:
    """What follows `kat`, for each run of a stage. `name` is the preset's, or its file."""
    line = [stage, "--preset", name]
    if stage in {"base", "distill"}:
        return [line]
    unified = [line] if stage == "sft" else []
    return [*([*line, "--expert", expert] for expert in experts), *unified]


def commands(
    preset: Preset, stage: str, lines: Iterable[list[str]]
) -> Mapping[str, tuple[str, ...]]:
    """What runs a stage, by machine, and the servers that make its rollouts."""
    scale = ScaleSettings() if stage == "base" else preset.scale
    every = tuple(shlex.join(launched(scale, line)) for line in lines)
    found = {f"node {node}": every for node in range(scale.nodes)}
    if stage in {"rl", "distill"} and (servers := tuple(server_lines(preset))):
        found["to be started" if preset.serve.urls else "started by node 0"] = servers
    return found


def launched(scale: ScaleSettings, line: Iterable[str]) -> list[str]:
    """One run of `kat`, which starts the processes of one machine itself."""
    if scale.nodes == 1:
        return ["kat", *line]
    spread = ["--nnodes", str(scale.nodes), "--nproc-per-node", str(scale.processes)]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", MEET_AT]
    return ["torchrun", *spread, *meet, "-m", "katcore.cli", *line]


def server_lines(preset: Preset) -> Iterator[str]:
    """The command line of each vLLM server, less its key; none if there are none."""
    serve = preset.serve
    if serve.engine != "vllm":
        return
    arguments = (
        *("--dtype", "auto", "--seed", "0"),
        *("--tensor-parallel-size", str(serve.tensor_parallel)),
        *("--max-model-len", str(preset.model.context)),
        *map(str, serve.options.get("arguments", ())),
    )
    start = Start(
        _SERVED,
        Path("python"),
        arguments,
        takes_weights=True,
        sleeps=serve.placement == "colocated",
    )
    for number in range(serve.replicas):
        if serve.urls:
            url = urlsplit(serve.urls[number])
            command = start.command(url.port or _PORT)
            command[command.index(HOST)] = url.hostname or HOST
            given = "VLLM_SERVER_DEV_MODE=1"
        else:
            command = start.command(_PORT + number)
            devices = ",".join(map(str, devices_of(serve, number)))
            given = f"VLLM_SERVER_DEV_MODE=1 CUDA_VISIBLE_DEVICES={devices}"
        yield f"{given} {shlex.join(command)}"


def devices_of(serve: ServeSettings, number: int) -> tuple[int, ...]:
    """The GPUs of one replica."""
    num = serve.tensor_parallel
    every = serve.devices or tuple(range(serve.replicas * num))
    return every[number * num : (number + 1) * num]
