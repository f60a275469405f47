"""A training's processes on one machine: `kat` starts itself for each, and ends all when one fails.

They find each other by what torchrun sets, too, so on several machines torchrun may start them instead.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from katcore.config import environment, rank_of_process
from katcore.errors import ConfigError, StageBusyError, StageError
from katcore.pipeline.child import BUSY_EXIT
from katcore.pipeline.parent import die_with_parent
from katcore.settings import ScaleSettings

_POLL_S = 0.1
_STOP_S = 10.0


def is_needed(scale: ScaleSettings) -> bool:
    """Whether this process is to start those that train, rather than one of them.

    Raises:
        ConfigError: there are several machines, and nobody started the processes on each; or not so many.
    """
    found = rank_of_process()
    if found:
        if found.world != scale.world:
            raise ConfigError(
                f"{found.world} processes were started, and scale asks for {scale.processes} on each of"
                f" {scale.nodes} nodes"
            )
        return False
    if scale.nodes > 1:
        raise ConfigError(
            f"scale.nodes is {scale.nodes}, and kat starts processes on one machine only: on each, run"
            f" torchrun --nnodes {scale.nodes} --nproc-per-node {scale.processes} --rdzv-backend c10d"
            " --rdzv-endpoint HOST:PORT -m katcore.cli, and what follows kat"
        )
    return scale.world > 1 or scale.zero > 0


def launch(command: Sequence[str], scale: ScaleSettings) -> None:
    """Run `kat` with these arguments in each process; the first one's output is this process's.

    Raises:
        StageBusyError: the first said so.
        StageError: one of them failed or was killed; the others were ended.
    """
    with tempfile.TemporaryDirectory(prefix="kat-ranks-") as folder:
        meet_at = str(Path(folder) / "store")
        processes = [_start(command, rank, scale.world, meet_at) for rank in range(scale.world)]
        try:
            _watch(processes)
        finally:
            _stop(processes)


def _start(
    command: Sequence[str], rank: int, world: int, meet_at: str
) -> "subprocess.Popen[bytes]":
    # Gradients cross no network: gloo and nccl listen on the loopback interface alone.
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "KATCORE_MEET_AT": meet_at,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "katcore.cli", *command],
        stdin=subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        env={**environment(), **own},
        preexec_fn=die_with_parent(signal.SIGTERM),
    )


def _watch(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    while processes[0].poll() is None and not any(process.poll() for process in processes):
        time.sleep(_POLL_S)
    if processes[0].returncode == 0:
        _await(processes[1:])
    time.sleep(_POLL_S)  # who lost a peer ends, too: look again for who went first
    codes = {rank: code for rank, process in enumerate(processes) if (code := process.poll())}
    if not codes:
        return
    if BUSY_EXIT in codes.values():
        raise StageBusyError("another process is at it; wait for it")
    rank, code = min(codes.items(), key=lambda item: (item[1] > 0, item[0]))
    how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
    raise StageError(
        f"process {rank} of {len(processes)} {how}; the others were ended. What it said is above; run the"
        " same command to go on from the last checkpoint"
    )


def _await(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Give processes some time to end by themselves."""
    ends_s = time.monotonic() + _STOP_S
    while time.monotonic() < ends_s and any(process.poll() is None for process in processes):
        time.sleep(_POLL_S)


def _stop(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
    _await(processes)
    for process in processes:
        process.kill()
        process.wait()
