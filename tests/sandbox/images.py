"""Small images in every form that they come in."""

import gzip
import hashlib
import io
import itertools
import json
import platform
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backports import zstd

MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> Any:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode = kind, link, mode
    return made


def layer(*items: "tuple[str, bytes] | tarfile.TarInfo | str") -> bytes:
    """A tar archive: files as (name, bytes), folders as "name/", anything else as it is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for item in items:
            if isinstance(item, tuple):
                made = entry(item[0])
                made.size = len(item[1])
                tar.addfile(made, io.BytesIO(item[1]))
            elif isinstance(item, str):
                tar.addfile(entry(item.rstrip("/"), tarfile.DIRTYPE, mode=0o755))
            else:
                tar.addfile(item)
    return buffer.getvalue()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def config_of(layers: Sequence[bytes], **own: Any) -> bytes:
    return json.dumps(
        {
            "architecture": MACHINE,
            "os": "linux",
            "config": own,
            "rootfs": {"type": "layers", "diff_ids": [digest_of(item) for item in layers]},
        }
    ).encode()


Pack = Callable[[bytes], bytes]
PACKERS: tuple[Pack, ...] = (gzip.compress, zstd.compress, bytes)
"""How layers are packed, in turn."""


def blobs_of(
    layers: Sequence[bytes], packers: Sequence[Pack] = PACKERS, **own: Any
) -> tuple[dict[str, bytes], str]:
    """All blobs of an image by digest, and the digest of its manifest."""
    packed = [pack(item) for pack, item in zip(itertools.cycle(packers), layers, strict=False)]
    config = config_of(layers, **own)
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"digest": digest_of(config), "size": len(config)},
            "layers": [{"digest": digest_of(item), "size": len(item)} for item in packed],
        }
    ).encode()
    blobs = {digest_of(item): item for item in (config, manifest, *packed)}
    return blobs, digest_of(manifest)


def index_of(manifest: str, size: int, **more: Any) -> bytes:
    """An index that has an image for another machine besides."""
    own = {"os": "linux", "architecture": MACHINE}
    other = {"os": "plan9", "architecture": "mips"}
    return json.dumps(
        {
            "schemaVersion": 2,
            "manifests": [
                {"digest": "sha256:" + "0" * 64, "size": 1, "platform": other},
                {"digest": manifest, "size": size, "platform": own, **more},
            ],
        }
    ).encode()


def write_layout(
    folder: Path,
    layers: Sequence[bytes],
    *,
    name: str = "",
    packers: Sequence[Pack] = PACKERS,
    **own: Any,
) -> Path:
    blobs, manifest = blobs_of(layers, packers, **own)
    (folder / "blobs" / "sha256").mkdir(parents=True)
    for digest, data in blobs.items():
        (folder / "blobs" / "sha256" / digest.removeprefix("sha256:")).write_bytes(data)
    notes = {"annotations": {"io.containerd.image.name": name}} if name else {}
    (folder / "index.json").write_bytes(index_of(manifest, len(blobs[manifest]), **notes))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def write_docker(path: Path, layers: Sequence[bytes], name: str, **own: Any) -> Path:
    """As `docker save` wrote before version 25."""
    config = config_of(layers, **own)
    files: Mapping[str, bytes] = {
        "config.json": config,
        **{f"{number}/layer.tar": item for number, item in enumerate(layers)},
        "manifest.json": json.dumps(
            [
                {
                    "Config": "config.json",
                    "RepoTags": [name],
                    "Layers": [f"{number}/layer.tar" for number in range(len(layers))],
                }
            ]
        ).encode(),
    }
    path.write_bytes(layer(*files.items()))
    return path


def write_archive(path: Path, folder: Path) -> Path:
    """An archive of a layout."""
    with tarfile.open(path, "w") as tar:
        tar.add(folder, ".")
    return path
