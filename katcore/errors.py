"""Every error katcore raises on purpose.

The tree says whose fault a failure was. `InfrastructureError` is the branch that never becomes a
reward: a rollout that ends in one is repeated or dropped, never scored.
"""


class KatError(Exception):
    """Base of all errors that katcore raises on purpose. The message is written for the user."""


class ConfigError(KatError):
    """A config, preset or argument is wrong. The message lists what would do."""


class PluginError(KatError):
    """A plugin cannot be imported, collides with another, or has no offer of the name asked for."""


class StageError(KatError):
    """A stage cannot run or its output is not what its manifest says."""


class StageBusyError(StageError):
    """Another process runs this stage. Waiting for it and asking again will do."""


class ServiceError(KatError):
    """Airflow or MLflow could not be started, or does not answer."""


class BenchError(KatError):
    """A benchmark cannot be run, or one of its parts died. Slow is no error."""


class TaskError(KatError):
    """A task directory is malformed, or asks for something the sandbox cannot build."""


class ImageError(KatError):
    """An image cannot be imported or pulled: it is malformed, unsafe, or not what its digest says."""


class InfrastructureError(KatError):
    """Something outside the policy failed. Never a reward."""


class SandboxError(InfrastructureError):
    """A sandbox could not be opened or used."""


class SandboxUnavailableError(SandboxError):
    """This machine cannot isolate sandboxes with this backend. Nothing runs unisolated instead."""


class SandboxTimeoutError(SandboxError):
    """A command ran past its limit; its whole process tree is dead."""


class SandboxGoneError(SandboxError):
    """The sandbox died underneath its user."""


class OutOfMemoryError(SandboxGoneError):
    """The sandbox as a whole needed more memory than its limit. A command that does is a result: 137."""


class EvictedError(SandboxGoneError):
    """Somebody else ended the sandbox: a person, a reaper, or a node that needed the room."""


class OutOfDiskError(SandboxError, OSError):
    """No space is left to make the sandbox, or in it to write what its user gave."""


class ImageMissingError(SandboxError):
    """What the sandbox starts from is not there, and cannot be made from what is."""


class StartTimeoutError(SandboxError):
    """The sandbox was not ready in time."""


class NoCapacityError(SandboxError):
    """The host has no room for the sandbox: processes, memory, descriptors or namespaces are used up."""


class SandboxElsewhereError(SandboxError):
    """What is left of a sandbox is on another machine, and cannot be destroyed from here."""


class LedgerError(SandboxError):
    """The ledger of leases cannot be read or written. No sandbox is opened that is not on record."""


class EngineError(InfrastructureError):
    """The inference engine failed or went away."""


class EngineBusyError(EngineError):
    """The engine has too much to do. The agent is told to ask again; no rollout fails for it."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineGoneError(EngineError):
    """The server of an engine does not answer any more."""


class RequestError(KatError):
    """An agent asked a model for what it cannot do. The agent is told; no rollout fails for it."""


class ContextOverflowError(RequestError):
    """A prompt leaves no room for an answer in the model's context."""


class ProxyError(InfrastructureError):
    """The proxy failed to record or serve a call."""


class VerifierError(InfrastructureError):
    """The verifier itself failed; nothing can be said about the rollout."""


class ScaffoldError(InfrastructureError):
    """The scaffold crashed for a reason that is not the policy's."""
