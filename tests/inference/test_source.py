"""Models that exist: folders are taken as they are, the hub by one revision, and never code."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from katcore.config import load_preset
from katcore.errors import ConfigError, StageError
from katcore.inference import source
from katcore.inference.chat import ChatTokenizer
from katcore.train.policy import load_policy
from tests.inference.tiny import write_tiny_model

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("source") / "tiny")
    (folder / "modeling_own.py").write_text("raise SystemExit\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def is_the_same(folder: Path, model: Path) -> bool:
    pairs = zip(load_policy(folder).parameters(), load_policy(model).parameters(), strict=True)
    is_equal = all(torch.equal(one, other) for one, other in pairs)
    return is_equal and not ChatTokenizer(folder).differences(ChatTokenizer(model))


def test_a_folder_is_copied_without_code(model: Path, tmp_path: Path) -> None:
    size = source.copy(model, tmp_path / "out" / "model")["num_bytes"]
    names = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"modeling_own.py", "pytorch_model.bin"}
    assert size == sum(path.stat().st_size for path in (tmp_path / "out" / "model").iterdir())
    assert is_the_same(tmp_path / "out" / "model", model)


def test_a_folder_without_weights_is_refused(model: Path, tmp_path: Path) -> None:
    source.copy(model, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"half: no model .* model\.safetensors is missing"):
        source.copy(tmp_path / "half", tmp_path / "out")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "half" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model-1\.safetensors, model-2\.safetensors is missing"):
        source.files_of(tmp_path / "half")
    with pytest.raises(ConfigError, match=r"config\.json, .* is missing"):
        source.files_of(tmp_path / "nowhere")


def test_another_state_of_a_folder_is_another_model(model: Path, tmp_path: Path) -> None:
    source.copy(model, tmp_path / "one")
    before = source.files_of(tmp_path / "one")
    assert source.files_of(tmp_path / "one") == before
    weights = tmp_path / "one" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert source.files_of(tmp_path / "one") != before


class Hub(BaseHTTPRequestHandler):
    """What of the hub's protocol a download of one revision asks for."""

    folder: Path

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def _answer(self, *, has_body: bool) -> None:
        path = self.path.partition("?")[0]
        content = self._content(path)
        self.send_response(404 if content is None else 200)
        content = content or b""
        if "/resolve/" in path:
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if has_body:
            self.wfile.write(content)

    def _content(self, path: str) -> bytes | None:
        names = sorted(one.name for one in self.folder.iterdir())
        if path == f"/api/models/org/tiny/revision/{REVISION}":
            files = [{"rfilename": name} for name in names]
            about = {"id": "org/tiny", "sha": REVISION, "siblings": files, "private": False}
            return json.dumps(about).encode()
        if path.startswith(f"/api/models/org/tiny/tree/{REVISION}"):
            return json.dumps(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": (self.folder / name).stat().st_size,
                        "oid": "0" * 40,
                    }
                    for name in names
                ]
            ).encode()
        prefix = f"/org/tiny/resolve/{REVISION}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in names:
            return (self.folder / path.removeprefix(prefix)).read_bytes()
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import huggingface_hub.constants as constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"folder": model}))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    # Read from HF_ENDPOINT, but when the library was imported.
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield url
    server.shutdown()


def test_a_revision_of_the_hub_is_downloaded(hub: str, model: Path, tmp_path: Path) -> None:
    source.download("org/tiny", REVISION, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert not names & {"modeling_own.py", "pytorch_model.bin", ".cache"}
    assert is_the_same(tmp_path / "model", model)


def test_what_the_hub_has_not_is_said(hub: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"(?s)cannot download org/none at .*kind: folder"):
        source.download("org/none", REVISION, tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: folder}", "kind: folder needs path"),
        ("{path: here}", "path means nothing with kind: scratch; set kind: folder"),
        ("{kind: hub, repo: a/b}", "kind: hub needs revision"),
        ("{kind: hub, repo: a/b, revision: main}", "should match pattern"),
        ("{kind: package}", "kind: package needs package"),
    ],
)
def test_a_model_has_one_source(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(f"summary: x\nmodel: {text}\n")
    with pytest.raises(ConfigError, match=message):
        load_preset(str(tmp_path / "p.yaml"))


def test_a_folder_is_found_from_the_presets_own(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("summary: x\nmodel: {kind: folder, path: models/base}\n")
    assert load_preset(str(tmp_path / "p.yaml")).model.path == str(tmp_path / "models" / "base")
