"""Fetching: both forms of the simple API, and the hash."""

import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from kat_swe.source import Release, fetch, links
from katcore.errors import TaskError


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("a_b-1.0/a.py")
        member.size = 6
        tar.addfile(member, io.BytesIO(b"x = 1\n"))
    return buffer.getvalue()


DATA = archive()


class Index(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/simple/a-b/":
            body, kind = b'<a href="../../files/a_b-1.0.tar.gz#sha256=00">a</a>', "text/html"
        else:
            body, kind = DATA, "application/gzip"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    server.server_close()


def test_an_html_index(index: str, tmp_path: Path) -> None:
    release = Release("a-b", "1.0", sha256(DATA).hexdigest())
    folder = fetch(release, tmp_path, index)
    assert (folder / "a.py").read_text() == "x = 1\n"
    assert fetch(release, tmp_path, "http://127.0.0.1:1/nothing") == folder


def test_another_hash_is_refused(index: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="nothing of it is used"):
        fetch(Release("a-b", "1.0", "0" * 64), tmp_path, index)
    assert not list(tmp_path.iterdir())


def test_a_release_that_is_not_there(index: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no source distribution"):
        fetch(Release("a-b", "2.0", "0" * 64), tmp_path, index)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="index"):
        fetch(Release("a-b", "1.0", "0" * 64), tmp_path, "http://127.0.0.1:1/simple")


def test_the_json_form() -> None:
    page = b'{"files": [{"filename": "a-1.0.tar.gz", "url": "../../f/a-1.0.tar.gz"}]}'
    found = links(page, "application/vnd.pypi.simple.v1+json", "https://x.org/simple/a/")
    assert found == {"a-1.0.tar.gz": "https://x.org/f/a-1.0.tar.gz"}
