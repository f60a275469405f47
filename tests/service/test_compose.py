"""docker-compose.yaml cannot be run everywhere; what nobody would notice is held here."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SECRET = re.compile(r"PASSWORD(?!S_FILE)|SECRET|FERNET|SQL_ALCHEMY_CONN")
# The keys of the Compose specification that we may use: a misspelt one would be passed over in silence.
KEYS = {
    *("build", "command", "depends_on", "environment", "healthcheck", "image", "init", "ports"),
    *("restart", "security_opt", "volumes"),
}


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    return content


def test_keys_and_references_exist(stack: dict[str, Any]) -> None:
    services = stack["services"]
    assert set(stack) <= {"name", "services", "volumes", "x-common"}
    for name, service in services.items():
        assert set(service) <= KEYS, name
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services
            condition = how["condition"]
            assert condition in {"service_healthy", "service_completed_successfully"}
            assert condition != "service_healthy" or "healthcheck" in services[needed]
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in stack["volumes"]
        assert all(isinstance(value, str) for value in service.get("environment", {}).values())


def test_no_secret_has_a_default(stack: dict[str, Any]) -> None:
    found = 0
    for service in stack["services"].values():
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key):
                found += 1
                assert re.search(r"\$\{KATCORE_\w+:\?[^}]+\}", value), f"{key} has a default"
    assert found >= 5


def test_ports_are_bound_on_loopback(stack: dict[str, Any]) -> None:
    ports = [port for item in stack["services"].values() for port in item.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_files_it_names_are_there() -> None:
    text = (ROOT / "docker-compose.yaml").read_text() + (ROOT / "Dockerfile").read_text()
    assert (ROOT / "scripts" / "migrate").stat().st_mode & 0o100
    for name in ("constraints/py311.txt", "scripts/migrate"):
        assert name in text
        assert (ROOT / name).exists()
