import stat
from configparser import ConfigParser
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from katcore.service.layout import Layout, dags_folder, prepare


def settings(layout: Layout) -> ConfigParser:
    found = ConfigParser()
    found.read(layout.config)
    return found


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "kat 100%")
    prepare(made, 18080)
    return made


def test_secrets_are_readable_by_their_owner_only(layout: Layout) -> None:
    for path in (layout.config, layout.passwords):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(layout.airflow.stat().st_mode) == 0o700


def test_secrets_are_made_anew_for_each_home_and_kept(layout: Layout, tmp_path: Path) -> None:
    other = Layout(tmp_path / "other")
    prepare(other, 18080)
    assert other.password() != layout.password()
    before, password = settings(layout), layout.password()
    prepare(layout, 18081)
    after = settings(layout)
    for section, key in (("core", "fernet_key"), ("api", "secret_key"), ("api_auth", "jwt_secret")):
        assert after[section][key] == before[section][key] != settings(other)[section][key]
    assert layout.password() == password
    assert len(password) >= 20
    Fernet(after["core"]["fernet_key"])


def test_everything_is_on_loopback_and_in_the_home(layout: Layout) -> None:
    found = settings(layout)
    assert found["api"]["host"] == "127.0.0.1"
    assert found["api"]["base_url"] == "http://127.0.0.1:18080"
    assert found["core"]["simple_auth_manager_all_admins"] == "False"
    assert found["core"]["simple_auth_manager_passwords_file"] == str(layout.passwords)
    assert found["logging"]["base_log_folder"].startswith(str(layout.home))
    assert not found["usage_data_collection"].getboolean("enabled")


def test_the_dag_files_are_found() -> None:
    assert (dags_folder() / "specialize_then_unify.py").is_file()
