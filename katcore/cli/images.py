"""Verbs for images: import and pull those of others, list what is there, remove what nothing needs."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from katcore.cli.common import errors_said, out, say
from katcore.config import home, secret

images = typer.Typer(
    no_args_is_help=True, help="Images that tasks start FROM: import, pull, list and remove them."
)
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
Name = Annotated[str, typer.Option(help="What a Dockerfile says after FROM; its own if empty.")]


@images.command("import")
def import_(
    path: Annotated[
        Path,
        typer.Argument(
            help="An OCI layout (folder or archive), of `docker save`, or a root tarball."
        ),
    ],
    name: Name = "",
) -> None:
    """Unpack an image into the store, its digests checked."""
    from katcore.sandbox.image import ImageStore
    from katcore.sandbox.imported import import_image

    with errors_said():
        say(f"FROM {import_image(ImageStore(home() / 'images'), path, name)}")


@images.command()
def pull(
    reference: Annotated[str, typer.Argument(help="[HOST/]NAME[:TAG], as of `docker pull`.")],
    name: Name = "",
    login: Annotated[
        str, typer.Option(help="The environment variable that holds user:password.")
    ] = "",
) -> None:
    """Pull an image from a registry over HTTPS; after an interruption it goes on."""
    from katcore.sandbox.image import ImageStore
    from katcore.sandbox.imported import pull_image

    with errors_said():
        root = home() / "images"
        store = ImageStore(root)
        key = secret(login) if login else ""
        pulled = pull_image(store, root, reference, name=name, login=key, report=say)
        say(f"FROM {asyncio.run(pulled)}")


@images.command("list")
def list_images(as_json: AsJson = False) -> None:  # noqa: FBT002
    """List the named images."""
    from katcore.sandbox.image import HOST, ImageStore

    with errors_said():
        store = ImageStore(home() / "images")
        found = []
        for name in store.names():
            image = store.named(name)
            kind = (
                "this machine"
                if name == HOST
                else "whole"
                if image and image.is_whole
                else "on host"
            )
            state = "" if image or name == HOST else "its files are gone"
            key = image.key if image else ""
            found.append({"name": name, "kind": kind, "key": key, "state": state})
        if as_json:
            typer.echo(json.dumps(found))
            return
        table = Table()
        for column in found[0]:
            table.add_column(column)
        for item in found:
            table.add_row(*item.values())
        out.print(table)


@images.command()
def prune(
    tasks: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders with tasks, besides those in katcore's home."),
    ] = None,
    unused_days: Annotated[float, typer.Option(min=0, help="Keep what was used since.")] = 7.0,
    names: Annotated[  # noqa: FBT002
        bool, typer.Option("--names", help="Also named images that no task starts from.")
    ] = False,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Remove images that nothing needs; nothing while a process may open sandboxes."""
    from katcore.sandbox.image import ImageStore
    from katcore.sandbox.prune import prune as remove

    with errors_said():
        folders = [*(tasks or ()), *_task_folders()]
        done = remove(ImageStore(home() / "images"), folders, unused_days=unused_days, names=names)
        if as_json:
            typer.echo(json.dumps(asdict(done)))
        else:
            say(
                f"removed {len(done.names)} names, {done.built} built images, {done.layers} layers"
                f" and {done.leftovers} unfinished ones"
            )


def _task_folders() -> Iterator[Path]:
    """Where katcore's home has tasks, and those that its collections say."""
    root = home()
    yield from (path for path in root.glob("*") if path.is_dir() and path.name != "images")
    for config in root.glob("collections/*/config.json"):
        yield Path(json.loads(config.read_bytes())["tasks"])
