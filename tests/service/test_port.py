import socket

import pytest

from katcore.errors import ServiceError
from katcore.service import port


@pytest.fixture
def taken() -> int:
    with socket.socket() as server:
        server.bind((port.HOST, 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_free_port_is_taken_without_a_word(taken: int) -> None:
    said: list[str] = []
    free = port.choose(taken + 1, "Airflow", said.append)
    assert port.choose(free, "Airflow", [].append) == free


def test_a_taken_port_says_which_and_takes_the_next(taken: int) -> None:
    said: list[str] = []
    found = port.choose(taken, "Airflow", said.append)
    assert taken < found < taken + 50
    assert said == [f"port {taken} is taken; Airflow listens on the next free one, {found}"]


def test_a_listener_on_all_interfaces_counts() -> None:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        assert not port.is_free(server.getsockname()[1])


def test_the_other_service_keeps_its_port(taken: int) -> None:
    first = port.choose(taken, "Airflow", [].append)
    assert port.choose(first, "MLflow", [].append, taken=(first,)) != first


def test_none_free_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "is_free", lambda _: False)
    with pytest.raises(ServiceError, match="--mlflow-port"):
        port.choose(5000, "MLflow", [].append)


@pytest.mark.parametrize("number", [0, -1, 70000])
def test_no_port_at_all(number: int) -> None:
    with pytest.raises(ServiceError, match="is no port"):
        port.choose(number, "Airflow", [].append)
