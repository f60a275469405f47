import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from katcore.errors import ServiceError
from katcore.service import http
from katcore.service.airflow import Airflow


class FakeServer(BaseHTTPRequestHandler):
    """An Airflow whose first token expires after one request."""

    logins = 0

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        if body.get("password") != "right":
            return self._answer(401, {"detail": "Invalid credentials"})
        FakeServer.logins += 1
        return self._answer(201, {"access_token": f"token-{FakeServer.logins}"})

    def do_GET(self) -> None:
        if self.headers["Authorization"] == "Bearer token-1":
            return self._answer(401, {"detail": "expired"})
        if self.path.endswith("/importErrors"):
            trace = "Traceback\nPluginError: no such thing\n"
            errors = [{"filename": "specialize_then_unify.py", "stack_trace": trace}]
            return self._answer(200, {"import_errors": errors})
        if "/dags/broken" in self.path:
            return self._answer(404, {"detail": "not found"})
        return self._answer(200, {"state": "running"})

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, content: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


@pytest.fixture
def url() -> Iterator[str]:
    FakeServer.logins = 0
    with HTTPServer(("127.0.0.1", 0), FakeServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_expired_token_is_renewed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert Airflow(url, "right").state("dag", "run+1") == "running"
    assert FakeServer.logins == 2


def test_a_wrong_password_is_refused(url: str) -> None:
    with pytest.raises(http.RefusedError, match="401 Invalid credentials"):
        Airflow(url, "wrong").state("dag", "run")


def test_a_dag_file_that_cannot_be_imported_says_why(url: str) -> None:
    with pytest.raises(ServiceError, match="cannot be imported: PluginError: no such thing"):
        Airflow(url, "right").dag("broken")


def test_nobody_there() -> None:
    with pytest.raises(http.UnreachableError, match="no answer"):
        http.call("GET", "http://127.0.0.1:9/", timeout_s=1)
