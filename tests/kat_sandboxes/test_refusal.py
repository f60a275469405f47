"""What an engine says when it refuses is told by the kind of the error."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from kat_sandboxes.docker.engine import Engine
from katcore.errors import ImageMissingError, NoCapacityError, OutOfDiskError, SandboxError


@contextmanager
def refusing(text: str) -> Iterator[str]:
    """The address of a fake engine that has this to say to all but its version."""

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_asked = self.path == "/version"
            body = json.dumps({"ApiVersion": "1.41"} if is_asked else {"message": text}).encode()
            self.send_response(200 if is_asked else 500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("mkdir /var/lib/docker/x: no space left on device", OutOfDiskError),
        ("write /x: disk quota exceeded", OutOfDiskError),
        ("No such image: localhost/x:latest", ImageMissingError),
        ("fork/exec /proc/self/exe: resource temporarily unavailable", NoCapacityError),
        ("it does not like you", SandboxError),
    ],
)
async def test_what_an_engine_says_is_told_by_kind(said: str, kind: type[SandboxError]) -> None:
    with refusing(said) as url:
        engine = Engine(url)
        with pytest.raises(SandboxError, match="the engine refuses") as error:
            await asyncio.wait_for(engine.call(engine.info), 30)
        engine.close()
    assert type(error.value) is kind
