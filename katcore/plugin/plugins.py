"""What is installed: load the entry points, refuse collisions, make offers by name."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import pluggy
from pydantic import ValidationError

from katcore import config
from katcore.errors import ConfigError, PluginError
from katcore.plugin import hookspecs
from katcore.plugin.offer import Offer
from katcore.schema.expert import Expert

GROUP = "katcore"
KINDS = ("dataset", "synthesizer", "sandbox", "scaffold", "engine", "verifier", "formatter")
_HOOKS = {kind: f"katcore_{kind}s" for kind in KINDS} | {"sandbox": "katcore_sandboxes"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Installed:
    """One offer or expert, and the plugin that supplies it."""

    kind: str
    name: str
    plugin: str
    package: str
    summary: str
    offer: Offer[Any, Any] | None = None
    expert: Expert | None = None


class Plugins:
    """The installed plugins. `Plugins.installed()` is how everything but a test gets one."""

    def __init__(self, modules: Mapping[str, ModuleType]) -> None:
        self._manager = pluggy.PluginManager("katcore")
        self._manager.add_hookspecs(hookspecs)
        for name, module in modules.items():
            try:
                self._manager.register(module, name=name)
                self._manager.check_pending()
            except pluggy.PluginValidationError as error:
                raise PluginError(f"plugin {name!r} does not fit this katcore: {error}") from error
        self._found = {kind: self._collect(kind) for kind in KINDS}
        self._experts = self._collect_experts()

    @classmethod
    def installed(cls) -> "Plugins":
        """All plugins of the entry-point group `katcore`, but those in KATCORE_PLUGINS_BLOCKED.

        Raises:
            PluginError: one cannot be imported; a run without it would silently be another run.
        """
        blocked = config.blocked_plugins()
        modules: dict[str, ModuleType] = {}
        for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
            if entry.name in blocked:
                continue
            if entry.name in modules:
                raise PluginError(
                    f"two installed distributions supply a plugin named {entry.name!r};"
                    " uninstall one"
                )
            try:
                modules[entry.name] = entry.load()
            except Exception as error:
                owner = entry.dist.name if entry.dist else "an unknown distribution"
                raise PluginError(
                    f"plugin {entry.name!r} of {owner} cannot be imported: {error!r};"
                    f" repair or uninstall it, or set KATCORE_PLUGINS_BLOCKED={entry.name}"
                ) from error
        return cls(modules)

    def names(self, kind: str) -> tuple[str, ...]:
        """The names that are offered for a kind ("sandbox", "scaffold", ...)."""
        return tuple(self._found[kind])

    def experts(self) -> dict[str, Expert]:
        """The installed experts by name, sorted."""
        return {name: found.expert for name, found in self._experts.items() if found.expert}

    def everything(self) -> Iterator[Installed]:
        """All offers and experts, for `kat plugins` and for stage keys."""
        for kind in KINDS:
            yield from self._found[kind].values()
        yield from self._experts.values()

    def find(self, kind: str, name: str) -> Installed:
        """The offer of that kind and name, or a PluginError that lists what is installed."""
        found = self._experts if kind == "expert" else self._found[kind]
        if name not in found:
            installed = ", ".join(found) or "none"
            raise PluginError(f"no {kind} named {name!r}; installed: {installed}")
        return found[name]

    def make(self, kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
        """Make the offered thing from its options.

        Raises:
            PluginError: no such offer.
            ConfigError: the options do not fit its config; names the plugin and the fields.
        """
        found = self.find(kind, name)
        assert found.offer is not None
        try:
            options_config = found.offer.config.model_validate(dict(options or {}))
        except ValidationError as error:
            fields = ", ".join(found.offer.config.model_fields) or "none"
            raise ConfigError(
                f"{kind} {name!r} (plugin {found.plugin!r}) refuses its options: {error};"
                f" it takes: {fields}"
            ) from error
        return found.offer.make(options_config)

    def notify(self, hook: str, event: object) -> None:
        """Tell the observers, one by one; an error of one is logged and stops nobody."""
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                arguments = (event,) if implementation.argnames else ()
                implementation.function(*arguments)
            except Exception:  # noqa: BLE001 - an observer must never stop a run
                _log.exception("observer %s of plugin %s failed", hook, implementation.plugin_name)

    def _collect(self, kind: str) -> dict[str, Installed]:
        found: dict[str, Installed] = {}
        for implementation in getattr(self._manager.hook, _HOOKS[kind]).get_hookimpls():
            for offer in _results(implementation):
                item = Installed(
                    kind,
                    offer.name,
                    implementation.plugin_name,
                    _package_of(implementation.plugin),
                    offer.summary,
                    offer=offer,
                )
                _add(found, item)
        return dict(sorted(found.items()))

    def _collect_experts(self) -> dict[str, Installed]:
        found: dict[str, Installed] = {}
        for implementation in self._manager.hook.katcore_experts.get_hookimpls():
            for expert in _results(implementation):
                item = Installed(
                    "expert",
                    expert.name,
                    implementation.plugin_name,
                    _package_of(implementation.plugin),
                    expert.summary,
                    expert=expert,
                )
                _add(found, item)
        return dict(sorted(found.items()))


def _results(implementation: Any) -> Iterable[Any]:
    results: Iterable[Any] = implementation.function()
    return results


def _package_of(plugin: object) -> str:
    return str(getattr(plugin, "__name__", "")).partition(".")[0]


def _add(found: dict[str, Installed], item: Installed) -> None:
    other = found.setdefault(item.name, item)
    if other is not item:
        raise PluginError(
            f"{item.kind} {item.name!r} is offered by both {other.plugin!r} and {item.plugin!r};"
            " uninstall one"
        )
