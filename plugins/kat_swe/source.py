"""Source distributions: pinned, fetched once, checked by hash, unpacked safely, never run on the host."""

import hashlib
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from katcore.errors import TaskError

DEFAULT_INDEX = "https://pypi.org/simple"
_ACCEPT = {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"}
_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Release:
    """One source distribution of a package."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Package:
    """What bugs are made in. `code` is the package or module, `tests` its suite; both in the archive.

    `older` releases give real bugs: what a later release repaired. `needs` are modules of other releases, by
    their path in the archive, that have to be beside it.
    """

    release: Release
    code: str
    tests: tuple[str, ...]
    is_held_out: bool = False
    older: tuple[Release, ...] = ()
    needs: tuple[tuple[Release, str], ...] = ()

    @property
    def name(self) -> str:
        """The name on the index."""
        return self.release.name


def configured_index() -> str:
    """The index that pip is configured to use; without one, the public index."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = dict(re.findall(r"^(.+?)\.index-url='(.*)'$", result.stdout, re.MULTILINE))
    for section in (":env:", "install", "global"):
        if section in found:
            return str(found[section])
    return DEFAULT_INDEX


def fetch(release: Release, cache: Path, index: str) -> Path:
    """The unpacked source of a release, from the cache or the index.

    Raises:
        TaskError: the index cannot be reached, has no such release, or its file has another hash.
    """
    folder = cache / f"{release.name}-{release.version}-{release.sha256[:12]}"
    if folder.exists():
        return folder
    data = _download(release, index)
    found = hashlib.sha256(data).hexdigest()
    if found != release.sha256:
        raise TaskError(
            f"{release.name} {release.version}: the index gave a file with sha256 {found},"
            f" pinned is {release.sha256}; nothing of it is used"
        )
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(temporary, filter="data")
    (inner,) = temporary.iterdir()
    inner.rename(folder)
    temporary.rmdir()
    return folder


def links(page: bytes, content_type: str, url: str) -> dict[str, str]:
    """File name to address, from an answer of the simple API, JSON (PEP 691) or HTML (PEP 503)."""
    if "json" in content_type:
        files = json.loads(page)["files"]
        return {file["filename"]: urllib.parse.urljoin(url, file["url"]) for file in files}
    parser = _Links()
    parser.feed(page.decode(errors="replace"))
    addresses = (urllib.parse.urljoin(url, target) for target in parser.targets)
    return {
        urllib.parse.unquote(urllib.parse.urlsplit(address).path.rpartition("/")[2]): address
        for address in addresses
    }


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.targets += [value for name, value in attrs if name == "href" and value]


def _download(release: Release, index: str) -> bytes:
    url = f"{index.rstrip('/')}/{release.name}/"
    wanted = re.compile(
        re.escape(release.name).replace(r"\-", "[-_.]")
        + f"-{re.escape(release.version)}\\.tar\\.gz",
        re.IGNORECASE,
    )
    try:
        with _open(url) as response:
            kind = response.headers.get("Content-Type", "")
            found = links(response.read(), kind, response.url)
        urls = [address for name, address in found.items() if wanted.fullmatch(name)]
        if not urls:
            raise TaskError(f"{url} has no source distribution {release.name} {release.version}")
        with _open(urls[0].partition("#")[0]) as response:
            data: bytes = response.read()
    except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
        raise TaskError(
            f"cannot fetch {release.name} {release.version} from {index}: {error}. The SWE expert needs a"
            " package index once (the synthesis option `index` names another); later its cache is enough"
        ) from error
    return data


def _open(url: str):  # type: ignore[no-untyped-def]
    return urllib.request.urlopen(urllib.request.Request(url, headers=_ACCEPT), timeout=_TIMEOUT_S)
