"""Images of environments: built by the engine once per content, and `host`, the machine's own programs."""

import re
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kat_sandboxes import host
from kat_sandboxes.docker import past
from kat_sandboxes.docker.engine import Engine
from katcore.errors import ImageMissingError, TaskError
from katcore.sandbox import history
from katcore.sandbox.image import HOST, ImageStore, content_key
from katcore.schema.task import SandboxSpec

_FROM = re.compile(r"^[ \t]*FROM[ \t]+(?:--\S+[ \t]+)*(\S+)(.*)$", re.IGNORECASE | re.MULTILINE)
_RUN = re.compile(r"^[ \t]*RUN[ \t]", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Built:
    """An image that the engine has.

    `on_host`: the machine's programs have to be mounted in it. `has_check`: it has a command that checks it.
    """

    tag: str
    env: tuple[str, ...]
    workdir: str
    on_host: bool
    has_check: bool


def build(engine: Engine, spec: SandboxSpec, images: Path, mark: str, network: str) -> Built:
    """The image of a spec's environment folder; built now if its content is new. Blocks.

    Its repositories know nothing beyond their HEAD, unless the spec `keeps_history`.

    Raises:
        TaskError: no Dockerfile, or one that the engine cannot build; or see `past.cut`.
        ImageMissingError: the engine cannot have the image that it starts from.
    """
    path = spec.environment / "Dockerfile"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read: {error}") from error
    parents = [found[1] for found in _FROM.finditer(text)]
    on_host = HOST in parents
    _refuse(path, text, parents, images)
    start = _host(engine, images, mark) if on_host else ""
    whole = _tag(spec.environment, start)
    tag = whole if spec.keeps_history else _tag(spec.environment, f"{start}\0{history.SCRIPT}")
    if engine.image(tag) is None:
        mounts = host_mounts(images, mark) if on_host else {}
        try:
            if engine.image(whole) is None:
                engine.build(whole, spec.environment, _on(text, start), network)
            if not spec.keeps_history:
                past.cut(engine, whole, tag, mounts, mark)
        except (TaskError, ImageMissingError) as error:
            raise type(error)(f"{path} (FROM {', '.join(parents)}): {error}") from error
    found = engine.image(tag)
    if found is None:
        raise TaskError(f"{path}: the engine built it, and does not know it as {tag}")
    return _built(tag, found, on_host=on_host)


def _tag(environment: Path, start: str) -> str:
    return f"localhost/katcore-environment:{content_key(environment, start)}"


def _refuse(path: Path, text: str, parents: list[str], images: Path) -> None:
    if HOST in parents and (len(parents) > 1 or _RUN.search(text)):
        raise TaskError(
            f"{path}: on top of `{HOST}`, docker has neither RUN nor stages, since the machine's programs"
            " are in no image: start FROM an image that has what RUN needs, or use the local backend"
        )
    named = set(parents) & set(ImageStore(images).names()) - {HOST}
    if named:
        # The engine would look for that name in a registry, and may find something else.
        raise TaskError(
            f"{path}: {', '.join(sorted(named))} is an image of the local backend: use that, or a Dockerfile"
            " that starts FROM an image of the engine's"
        )


def _on(text: str, start: str) -> str:
    """The Dockerfile as the engine can build it."""
    if not start:
        return text
    env = " ".join(f"{name}={value}" for name, value in _environment().items())
    return _FROM.sub(lambda found: f"FROM {start}{found[2]}\nENV {env}", text)


def _built(tag: str, config: dict[str, Any], *, on_host: bool) -> Built:
    env = tuple(config.get("Env") or ())
    workdir = config.get("WorkingDir") or "/"
    return Built(tag, env, workdir, on_host, has_check=bool(config.get("Healthcheck")))


def _host(engine: Engine, images: Path, mark: str) -> str:
    """The image of the base layer: folders, links and a small /etc. Its programs are mounted, not copied."""
    layer = host.base_layer(images, mark)
    tag = f"localhost/katcore-{layer.name}:latest"
    if engine.image(tag) is None:
        with tempfile.NamedTemporaryFile(prefix="katcore-host-") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                tar.add(layer, ".", filter=_of_root)
            file.flush()
            engine.load(tag, Path(file.name))
    return tag


def _of_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _environment() -> dict[str, str]:
    folders = [str(host.interpreter().parent), "/usr/local/bin", "/usr/bin", "/bin"]
    own = {"PATH": ":".join(folders), "PYTHONPATH": f"{host.TOOLS}/lib"}
    return own | {"HOME": "/root", "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONDONTWRITEBYTECODE": "1"}


def host_mounts(images: Path, mark: str) -> dict[str, str]:
    """What an image on top of `host` has to be shown: the machine's programs, but no installed packages."""
    tools = host.tools(images, mark)
    mounts = {folder: folder for folder in host.shared_folders()}
    mounts |= {folder: str(tools / "empty") for folder in host.masked_folders()}
    return mounts | {host.TOOLS: str(tools)}
