import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from katcore.config import environment
from katcore.service import process, state, supervisor
from katcore.service.catalog import Service, service_environment
from katcore.service.layout import Layout, prepare

HOLD = """
import sys, time
from pathlib import Path
from katcore.service import state
from katcore.service.layout import Layout
with state.alive(Layout(Path(sys.argv[1]))) as is_only_one:
    print(is_only_one, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    prepare(made, 18080)
    return made


def supervise(
    layout: Layout, services: Sequence[Service], monkeypatch: pytest.MonkeyPatch
) -> supervisor.Supervisor:
    monkeypatch.setattr(supervisor, "services", lambda *_: tuple(services))
    monkeypatch.setattr(supervisor, "_POLL_S", 0.02)
    return supervisor.Supervisor(layout, 1, 2)


def python(name: str, code: str, *, needs: str = "", is_step: bool = False) -> Service:
    return Service(name, (sys.executable, "-c", code), needs, is_step)


def test_a_service_that_cannot_be_asked_is_well_while_it_runs(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    running = supervise(layout, [Service("reaper", command, has_health=False)], monkeypatch)
    thread = threading.Thread(target=running.run)
    thread.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not ((found := state.read(layout)) and found.is_ready):
        time.sleep(0.02)
    assert found
    assert found.is_ready
    assert list(found.pids) == ["reaper"]
    running.stop(15, None)
    thread.join(30)
    assert process.marked(process.MARK, str(layout.home)) == []


def test_a_service_that_keeps_dying_ends_all_and_is_named(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = python("dying", "import sys; sys.exit('cannot bind')")
    steady = python("steady", "import time; time.sleep(60)")
    supervise(layout, [steady, dying], monkeypatch).run()
    found = state.read(layout)
    assert found
    assert found.failed == "dying"
    assert not found.is_ready
    assert layout.log("dying").read_text().count("cannot bind") == 4
    assert process.marked(process.MARK, str(layout.home)) == []


def test_services_wait_for_the_step_that_they_need(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = layout.home / "order"
    say = "import time, pathlib; time.sleep({}); open('" + str(order) + "', 'a').write('{} ')"
    step = python("migrate", say.format(0.5, "step"), is_step=True)
    after = python("after", say.format(0, "after") + "; time.sleep(60)", needs="migrate")
    running = supervise(layout, [after, step], monkeypatch)
    thread = threading.Thread(target=running.run)
    thread.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (order.exists() and "after" in order.read_text()):
        time.sleep(0.05)
    running.stop(15, None)
    thread.join(30)
    assert order.read_text() == "step after "
    assert process.marked(process.MARK, str(layout.home)) == []


def test_a_killed_supervisor_is_not_alive(layout: Layout) -> None:
    assert not state.is_alive(layout)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(layout.home)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "True\n"
        assert state.is_alive(layout)
        with state.alive(layout) as is_only_one:
            assert not is_only_one
        holder.kill()
    assert not state.is_alive(layout)


def test_settings_of_another_airflow_do_not_get_through(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    monkeypatch.setenv("NO_PROXY", "example.org")
    found = service_environment(layout)
    assert "elsewhere" not in " ".join(found.values())
    assert found["AIRFLOW_HOME"] == str(layout.airflow)
    assert found["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert set(environment()) >= {"MLFLOW_TRACKING_URI"}
