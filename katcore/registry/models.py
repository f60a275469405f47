"""Registered models: one version per evaluated model folder, found again by the key of its stage."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from katcore.errors import ConfigError
from katcore.registry.store import client


def register(name: str, folder: Path, tags: Mapping[str, str], aliases: Iterable[str] = ()) -> str:
    """Make a version of `folder`, or find the one that has the same `katcore.key`; returns its number."""
    store = client()
    try:
        store.create_registered_model(name)
    except (MlflowException, RestException) as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    versions = store.search_model_versions(f"name = '{name}'")
    same = [item for item in versions if item.tags.get("katcore.key") == tags.get("katcore.key")]
    if same:
        version = str(same[0].version)
    else:
        made = store.create_model_version(name, source=folder.as_uri(), tags=dict(tags))
        version = str(made.version)
    for alias in aliases:
        store.set_registered_model_alias(name, alias, version)
    return version


def find(uri: str) -> Path:
    """The folder of a version: `models:/NAME/VERSION`, or `models:/NAME@ALIAS`.

    Raises:
        ConfigError: there is none; says what there is.
    """
    store, named = client(), uri.removeprefix("models:/")
    name, _, number = named.partition("/")
    base, _, alias = named.partition("@")
    try:
        if alias:
            found = store.get_model_version_by_alias(base, alias)
        else:
            found = store.get_model_version(name, number)
    except (MlflowException, RestException) as error:
        names = [f"models:/{item.name}" for item in store.search_registered_models()]
        raise ConfigError(
            f"no registered model {uri!r}: {error.message}; write models:/NAME/VERSION or models:/NAME@ALIAS"
            f" of: {', '.join(names) or 'none, for no model is registered'}"
        ) from error
    return Path(unquote(urlsplit(str(found.source)).path))
