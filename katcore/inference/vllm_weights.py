"""How a running vLLM server gets new weights, and how it makes room on its GPUs.

All but adapters needs a server that was started with VLLM_SERVER_DEV_MODE=1; adapters need --enable-lora and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, sleep needs --enable-sleep-mode and a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from katcore.errors import EngineError, EngineGoneError, RequestError
from katcore.inference.vllm_http import VllmClient

_ADAPTER = "adapter_config.json"


def is_adapter(folder: Path) -> bool:
    """Whether a folder has a low-rank adapter, as `peft` writes it, and no whole model."""
    return (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file()


async def replace_weights(client: VllmClient, folder: Path, *, is_asleep: bool) -> None:
    """Put the weights of a model folder in the place of the server's.

    One that sleeps has no weights any more: they get their memory back first, the cache last.

    Raises:
        EngineError: it does not take them; says how it has to be started.
    """
    with _refused(client, f"does not take {folder}", "VLLM_SERVER_DEV_MODE=1 (`takes_weights`)"):
        if is_asleep:
            await client.tell("/wake_up?tags=weights")
            await _reload(client, folder)
            await client.tell("/wake_up?tags=kv_cache")
            await client.tell("/reset_prefix_cache")
            return
        await client.tell("/pause?mode=wait")
        try:
            await _reload(client, folder)
            await client.tell("/reset_prefix_cache")
        finally:
            await client.tell("/resume")


async def add_adapter(client: VllmClient, folder: Path, name: str, *, is_asleep: bool) -> None:
    """Serve an adapter of the server's model, under a name of its own, beside those that are there.

    Raises:
        EngineError: it does not take it; says how it has to be started.
    """
    how = "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True (`adapter_rank`)"
    with _refused(client, f"does not take the adapter {folder}", how):
        if is_asleep:
            await client.tell("/wake_up")
        body = {"lora_name": name, "lora_path": _path(folder)}
        await client.tell("/v1/load_lora_adapter", body)


async def remove_adapter(client: VllmClient, name: str) -> None:
    """Let go of an adapter."""
    with _refused(client, f"does not let go of the adapter {name}", "--enable-lora"):
        await client.tell("/v1/unload_lora_adapter", {"lora_name": name})


async def send_to_sleep(client: VllmClient, *, keeps_weights: bool) -> None:
    """Have the server let go of its cache and its weights; kept ones wait in main memory.

    Raises:
        EngineError: it cannot; says how it has to be started.
    """
    level = 1 if keeps_weights else 2
    with _refused(
        client, "does not sleep", "--enable-sleep-mode and VLLM_SERVER_DEV_MODE=1 (`sleeps`)"
    ):
        await client.tell(f"/sleep?level={level}")


async def _reload(client: VllmClient, folder: Path) -> None:
    given = {"weights_path": _path(folder)}
    await client.tell("/collective_rpc", {"method": "reload_weights", "kwargs": given})


def _path(folder: Path) -> str:
    """For a server that was started in another folder."""
    return str(folder.resolve())


@contextmanager
def _refused(client: VllmClient, what: str, how: str) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise EngineError(f"{client.url} {what}: {error}") from error
    except EngineGoneError:
        raise
    except EngineError as error:
        raise EngineError(
            f"{client.url} {what}: {error}; a server can if it was started with {how}"
        ) from error
