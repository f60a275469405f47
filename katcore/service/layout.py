"""Which file of the services is where under katcore's home, and how Airflow is set up.

The secrets are made once, with the first start, and are readable by their owner only.
"""

import base64
import json
import os
import secrets
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

import katcore
from katcore.service.port import HOST

USER = "admin"
_SECRETS = (("core", "fernet_key"), ("api", "secret_key"), ("api_auth", "jwt_secret"))


class Layout:
    """The files of the services under one home folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.airflow = home / "airflow"
        self.config = self.airflow / "airflow.cfg"
        self.database = self.airflow / "airflow.db"
        self.migrated = self.airflow / "migrated"
        self.passwords = self.airflow / "passwords.json"
        self.logs = home / "logs"
        self.services = home / "services"
        self.lock = self.services / "supervisor.lock"
        self.state = self.services / "state.json"

    def log(self, service: str) -> Path:
        """The log file of a service."""
        return self.logs / f"{service}.log"

    def is_migrated(self) -> bool:
        """Whether the database has the tables of the installed Airflow."""
        is_there = self.database.exists() and self.migrated.exists()
        return is_there and self.migrated.read_text() == metadata.version("apache-airflow-core")

    def remember_migrated(self) -> None:
        """Note that it has."""
        self.migrated.write_text(metadata.version("apache-airflow-core"))

    def password(self) -> str:
        """The password of USER."""
        found: str = json.loads(self.passwords.read_text())[USER]
        return found


def dags_folder() -> Path:
    """The DAG files: inside an installed katcore, beside it in a checkout."""
    package = Path(katcore.__file__).parent
    installed = package / "dags"
    return installed if installed.is_dir() else package.parent / "dags"


def prepare(layout: Layout, port: int) -> None:
    """Write Airflow's configuration and password file; keeps the secrets of an earlier start."""
    for folder in (layout.airflow, layout.logs, layout.services):
        folder.mkdir(parents=True, exist_ok=True)
    layout.airflow.chmod(0o700)
    if not layout.passwords.exists():
        write_private(layout.passwords, json.dumps({USER: secrets.token_urlsafe(18)}) + "\n")
    before = ConfigParser(interpolation=None)
    before.read(layout.config)
    config = ConfigParser(interpolation=None)
    config.read_dict(_settings(layout, port))
    for section, key in _SECRETS:
        config.setdefault(section, {})
        config[section][key] = before.get(section, key, fallback=_secret())
    lines = ["# Written by `kat up`; changes are lost."]
    for section in config.sections():
        lines += [f"[{section}]", *(f"{key} = {value}" for key, value in config[section].items())]
    write_private(layout.config, "\n".join(lines) + "\n")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def _secret() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


def _settings(layout: Layout, port: int) -> dict[str, dict[str, str]]:
    def path(value: Path) -> str:
        return str(value).replace("%", "%%")

    url = quote(str(layout.database)).replace("%", "%%")
    return {
        "core": {
            "dags_folder": path(dags_folder()),
            "executor": "LocalExecutor",
            "parallelism": "4",
            "load_examples": "False",
            "simple_auth_manager_users": f"{USER}:admin",
            "simple_auth_manager_passwords_file": path(layout.passwords),
            "simple_auth_manager_all_admins": "False",
            "hostname_callable": "socket.gethostname",
            "dagbag_import_timeout": "120",
        },
        "database": {"sql_alchemy_conn": f"sqlite:///{url}"},
        "logging": {
            "base_log_folder": path(layout.logs / "airflow"),
            "dag_processor_child_process_log_directory": path(layout.logs / "airflow-parsing"),
        },
        "api": {
            "host": HOST,
            "port": str(port),
            # The workers' own API is found from here, so the port has to be in it.
            "base_url": f"http://{HOST}:{port}",
            "workers": "1",
        },
        # The stages keep all cores busy; an answer may take its time.
        "workers": {"min_heartbeat_interval": "2", "execution_api_timeout": "60"},
        "scheduler": {"task_instance_heartbeat_timeout": "120"},
        "dag_processor": {
            "parsing_processes": "1",
            "min_file_process_interval": "60",
            "refresh_interval": "60",
            "dag_file_processor_timeout": "180",
        },
        "usage_data_collection": {"enabled": "False"},
    }
