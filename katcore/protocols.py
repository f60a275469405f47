"""All the Protocols on one page, in the order a rollout uses them."""

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from katcore.schema.call import EngineRequest, Generation, Message, ScoreRequest, Tool
from katcore.schema.capacity import Capacity
from katcore.schema.lease import Holder, Lease
from katcore.schema.rollout import (
    ExecResult,
    Installation,
    ModelEndpoint,
    Rollout,
    Trajectory,
    Verdict,
)
from katcore.schema.task import SandboxSpec, Task

RowT_co = TypeVar("RowT_co", covariant=True)


class Synthesizer(Protocol):
    """Makes tasks from real material, as Harbor task directories."""

    def synthesize(self, out: Path, *, seed: int, report: Callable[[str], None]) -> None:
        """Write `out/<split>/<task id>/` directories, splits `train` and `held-out`.

        The same seed and material give the same bytes. `report` takes progress lines.

        Raises:
            TaskError: the material cannot be turned into tasks; says what is missing.
        """


class Dataset(Protocol):
    """A named source of tasks."""

    def tasks(self, split: str) -> Iterator[Task]:
        """The tasks of a split, in a stable order."""


class Sandbox(Protocol):
    """A running, isolated machine. Paths are absolute, and inside it."""

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> ExecResult:
        """Run `argv`. A non-zero exit is a result, not an error. `cwd` defaults to the WORKDIR.

        Raises:
            SandboxTimeoutError: `timeout_s` seconds passed; the process tree is dead.
            SandboxGoneError: the machine is no longer there; of a kind that says why, if that is known.
        """

    async def read(self, path: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError, IsADirectoryError, PermissionError."""

    async def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, and its folders.

        Raises:
            OutOfDiskError: the sandbox has no space left.
            OSError: as `read`.
        """


@runtime_checkable
class SupportsChanges(Protocol):
    """A sandbox that can say what was changed since it was opened, and repeat it in another."""

    async def changes(self) -> bytes:
        """An archive of all changed and deleted files outside /tmp, /proc and /dev.

        It is not compressed: what a file holds is found in it as it is.
        """

    async def apply(self, changes: bytes) -> None:
        """Make the changes of another sandbox of the same image."""


@runtime_checkable
class SupportsDoor(Protocol):
    """A sandbox with a way out to one service of the host, and to nothing else."""

    def door(self) -> tuple[socket.socket, str]:
        """A listening socket in the sandbox's own network, and its URL there.

        Who accepts, serves the sandbox. The socket is the caller's from now on.

        Raises:
            SandboxError: it was opened without `has_door`, or the door is taken.
        """


@runtime_checkable
class SupportsLive(Protocol):
    """A sandbox that can be judged while it runs, if it was opened with `is_live`.

    From the start, /tests and /logs are folders that only the grader, a user of its own, can read or write.
    """

    async def settle(self, services: Sequence[str], *, grace_s: float = 0.0) -> tuple[str, ...]:
        """Kill all processes of the agent's user whose program is none of `services`; what the killed ran.

        They are stopped all at once, so that none can start another meanwhile. First they have `grace_s`
        seconds to end by themselves.
        """

    def grader(self) -> AbstractAsyncContextManager[Sandbox]:
        """The same machine as the grader: its commands, files it reads, and files it writes.

        Processes of the agent's user can neither signal nor trace its own.

        Raises:
            SandboxError: it cannot be entered, or those folders are not what they were.
        """


@runtime_checkable
class SupportsSnapshot(Protocol):
    """A sandbox whose files others can start from."""

    def snapshot(self) -> AbstractAsyncContextManager[str]:
        """Its files as they are now, but for /tmp, /run, /proc and /dev; no processes.

        While in the context, `SandboxSpec.snapshot` may have this name; the sandbox itself may be closed.
        """


@runtime_checkable
class SupportsHandle(Protocol):
    """A sandbox that another process can find."""

    def handle(self) -> str:
        """What its backend's `destroy` finds it by, also in another process, and when it is gone."""


class SandboxBackend(Protocol):
    """Opens sandboxes. Leaving the context destroys the machine, whatever happened inside."""

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """A fresh machine.

        Raises:
            SandboxUnavailableError: this host cannot isolate.
            TaskError: the environment's Dockerfile uses what the backend cannot build.
            ImageMissingError, NoCapacityError, OutOfDiskError, StartTimeoutError: what they say. An error of
                one of these kinds is tried again as `katcore.retry` has it; any other, twice.
        """

    async def close(self) -> None:
        """Destroy whatever is still open and stop helper processes."""


@runtime_checkable
class SupportsCapacity(Protocol):
    """A backend that knows how much its node has for sandboxes."""

    def capacity(self) -> Capacity:
        """All that it has, used or not. What a sandbox needs is counted against it before it is opened."""


@runtime_checkable
class SupportsReap(Protocol):
    """A backend that can destroy what another process made with it, one that is dead maybe.

    It touches nothing but what it is given the handle or the mark of. What is gone already is no error, and
    two processes may do the same at once.
    """

    def mark(self) -> str:
        """What all that this object makes carries, and nothing else does; known before it makes anything."""

    async def destroy(self, lease: Lease) -> None:
        """Destroy the sandbox of a lease that has a handle; whoever uses it gets SandboxGoneError.

        Raises:
            SandboxElsewhereError: it is on another machine.
            SandboxError: it could not be destroyed.
        """

    async def sweep(self, holder: Holder) -> None:
        """Destroy all that carries a dead holder's mark: sandboxes, half-made ones too, and what they needed.

        Raises:
            SandboxElsewhereError: some of it may be on another machine.
            SandboxError: something could not be destroyed.
        """


@runtime_checkable
class SupportsManifest(Protocol):
    """A backend whose sandboxes are objects of a cluster."""

    async def manifest(self, spec: SandboxSpec) -> str:
        """What it would have the cluster make for a sandbox, as JSON or YAML; nothing is made or built.

        Raises:
            ConfigError: its options leave open what that is.
        """


class Engine(Protocol):
    """Samples from a model: token ids in, token ids and log-probabilities out."""

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        """Ids of `messages[start:]`, ending where the assistant's answer begins.

        With `start`, `messages[start - 1]` is an answer of the assistant, and the ids follow its end-of-turn
        token. Safe to call from another thread.

        Raises:
            RequestError: the model takes no such message, for instance no images.
        """

    async def generate(self, request: EngineRequest) -> Generation:
        """One completion.

        Raises:
            EngineError: the engine failed.
            EngineBusyError: it will take the request later.
            RequestError: the model cannot do what is asked, as with a prompt beyond its context
                (`ContextOverflowError`).
        """


@runtime_checkable
class SupportsOpen(Protocol):
    """An engine that takes long to be ready, or might not be fit for use."""

    async def open(self, report: Callable[[str], None]) -> None:
        """Wait until it can answer. `report` takes progress lines. Without it, the first call waits.

        Raises:
            EngineError: it cannot be used; says why.
        """


@runtime_checkable
class SupportsClose(Protocol):
    """An engine that holds connections or processes."""

    async def close(self) -> None:
        """Let go of them; the engine is of no use any more."""


@runtime_checkable
class SupportsTokens(Protocol):
    """An engine whose ids can be read."""

    def token_texts(self, ids: Iterable[int]) -> dict[int, str]:
        """The text of each id, by id."""


@runtime_checkable
class SupportsScore(Protocol):
    """An engine that says how likely ids are that are there already."""

    async def score(self, request: ScoreRequest) -> tuple[float, ...]:
        """The log-probability of the id at each of `places`, computed anew each time that it is asked.

        Requests that are open at once share batches, in the order in which they came: so whoever asks again
        in another order gets other batch mates and other padding.

        Raises:
            EngineError: the engine failed.
            EngineBusyError: it will take the request later.
            RequestError: it cannot score as `sampling` draws, or the ids are too many.
        """


@runtime_checkable
class SupportsWeights(Protocol):
    """An engine whose weights can be exchanged while it runs."""

    async def load_weights(self, folder: Path, version: str) -> None:
        """Take the weights of a model folder, or of a folder with an adapter for the model that it has.

        Each answer is of one version, and signed with it: what is being answered is finished with the weights
        that it was begun with. An engine that sleeps is awake afterwards.

        Raises:
            EngineError: it does not take them. Nothing is answered then until it has taken some.
        """


@runtime_checkable
class SupportsSleep(Protocol):
    """An engine that can make room for others on its device."""

    async def sleep(self) -> None:
        """Finish what is being answered and let go of the device's memory; calls wait for new weights.

        Raises:
            EngineError: it cannot.
        """


class Scaffold(Protocol):
    """A coding agent, as a black box that talks to a model endpoint."""

    async def run(self, prompt: str, sandbox: Sandbox, endpoint: ModelEndpoint) -> ExecResult:
        """Work on `prompt` until done. `stderr` says why it ended."""


@runtime_checkable
class RunsInside(Protocol):
    """A scaffold whose program runs in the sandbox."""

    async def install(self, report: Callable[[str], None]) -> Installation:
        """What the sandbox has to have. Made once; later calls find it.

        Raises:
            ScaffoldError: it cannot be installed; says what is missing.
        """


class Verifier(Protocol):
    """Judges the state the agent left behind. The same state gives the same verdict."""

    async def verify(self, task: Task, sandbox: Sandbox, trajectory: Trajectory) -> Verdict:
        """Judge `sandbox`: a fresh machine to which the agent's changes were applied.

        For a task with `services` it is the agent's own, as another user (`SupportsLive`).

        Raises:
            VerifierError: nothing can be said; never a reward of 0.
        """


class Formatter(Protocol[RowT_co]):
    """Turns rollouts into rows: token trees (`Sample`) for the stages, or dicts for other trainers.

    The same rollouts give the same rows.
    """

    def samples(self, rollouts: Iterable[Rollout]) -> Iterator[RowT_co]:
        """The rows of all usable rollouts, in order.

        Raises:
            StageError: a rollout holds what this kind of row may not be made of.
        """
