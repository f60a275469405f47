"""Images of pods: built by a container engine here, and pushed to where the cluster pulls from."""

import asyncio
import shutil
import tempfile
from pathlib import Path

from kat_sandboxes.docker import bundle, image
from kat_sandboxes.docker.engine import Engine
from kat_sandboxes.docker.image import Built
from kat_sandboxes.kubernetes.config import KubernetesConfig
from kat_sandboxes.kubernetes.manifest import MODULES, NOBODY, Images
from katcore.config import home
from katcore.errors import ConfigError, SandboxUnavailableError, TaskError
from katcore.sandbox import history
from katcore.sandbox.image import HOST, content_key
from katcore.schema.task import SandboxSpec

_SCRATCH = f"FROM scratch\nCOPY --chown={NOBODY}:{NOBODY} . /.kat/\n"


class Builder:
    """The images of one backend. What was pushed once is not pushed again."""

    def __init__(self, config: KubernetesConfig, mark: str) -> None:
        self._config = config
        self._mark = mark
        self._engine = Engine(config.engine)
        self._lock = asyncio.Lock()
        self._building: dict[str, asyncio.Lock] = {}
        self._pushed: set[str] = set()
        self._agent: Path | None = None
        self._tools: dict[Path, str] = {}

    def close(self) -> None:
        """Let go of the engine."""
        self._engine.close()

    async def names(self, spec: SandboxSpec) -> Images:
        """What the images of a spec are called; nothing is built.

        Raises:
            ConfigError: no registry is set.
        """
        if not self._config.registry:
            raise ConfigError(
                "kubernetes pulls its images: say with the option `registry` where to, such as"
                " registry.example.com/katcore"
            )
        async with self._lock:
            if self._agent is None:
                self._agent = await asyncio.to_thread(
                    bundle.make, home() / "kubernetes", self._mark, *MODULES
                )
            beside = self._agent.name
            if spec.tools:
                beside += f"-{await self._tools_key(spec.tools)}"
        past = "" if spec.keeps_history else history.SCRIPT
        key = await asyncio.to_thread(content_key, spec.environment, past)
        registry = self._config.registry.rstrip("/")
        return Images(
            f"{registry}/katcore-environment:{key}", f"{registry}/katcore-{beside}:1", self._agent
        )

    async def make(self, spec: SandboxSpec) -> tuple[Images, Built]:
        """Build and push what the registry may not have.

        Raises:
            TaskError, ImageMissingError: see `docker.image.build`; or the registry does not take it.
            SandboxUnavailableError: no engine answers.
        """
        images = await self.names(spec)
        try:
            async with self._building.setdefault(images.channel, asyncio.Lock()):
                await self._engine.call(self._make_channel, images, spec.tools)
            async with self._building.setdefault(images.sandbox, asyncio.Lock()):
                return images, await self._engine.call(self._make_sandbox, images, spec)
        except SandboxUnavailableError as error:
            raise SandboxUnavailableError(
                f"kubernetes needs a container engine here, to build and push {images.sandbox}: {error}"
            ) from error

    async def _tools_key(self, tools: Path) -> str:
        if tools not in self._tools:
            self._tools[tools] = (await asyncio.to_thread(content_key, tools, ""))[:16]
        return self._tools[tools]

    def _make_sandbox(self, images: Images, spec: SandboxSpec) -> Built:
        local = home() / "images"
        built = image.build(self._engine, spec, local, self._mark, self._config.network)
        if built.on_host:
            raise TaskError(
                f"{spec.environment / 'Dockerfile'}: the programs of this machine (FROM {HOST}) are in no"
                " image, so that no other machine has them: start FROM an image, or use another backend"
            )
        self._push(built.tag, images.sandbox)
        return built

    def _make_channel(self, images: Images, tools: Path | None) -> None:
        if images.channel in self._pushed:
            return
        with tempfile.TemporaryDirectory(prefix="katcore-channel-") as temporary:
            folder = Path(temporary)
            shutil.copytree(images.bundle, folder / "agent", symlinks=True)
            if tools:
                shutil.copytree(tools, folder / "tools", symlinks=True)
            for name in ("tools", "shared", "channel", "own"):
                (folder / name).mkdir(exist_ok=True)
            self._engine.build(images.channel, folder, _SCRATCH, "none")
        self._push(images.channel, images.channel)

    def _push(self, tag: str, name: str) -> None:
        if name in self._pushed:
            return
        self._engine.tag(tag, name)
        if self._config.pushes:
            self._engine.push(name)
        self._pushed.add(name)
