"""The plugin host finds, refuses and makes by name."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

from katcore.errors import ConfigError, PluginError
from katcore.plugin import Offer, Plugins, hookimpl
from katcore.schema.event import StageFinished


class EchoConfig(BaseModel, extra="forbid"):
    word: str = "hello"


def plugin(name: str, **hooks: Any) -> ModuleType:
    module = ModuleType(name)
    for hook, function in hooks.items():
        function.__module__ = name
        setattr(module, hook, hookimpl(function))
    return module


def offering(*names: str) -> ModuleType:
    def katcore_datasets() -> Iterator[Offer[EchoConfig, Any]]:
        for name in names:
            yield Offer(name, EchoConfig, lambda config: config.word, "echoes")

    return plugin("kat_echo", katcore_datasets=katcore_datasets)


def test_an_offer_is_made_from_its_options() -> None:
    plugins = Plugins({"echo": offering("echo")})
    assert plugins.make("dataset", "echo", {"word": "hi"}) == "hi"
    assert plugins.names("dataset") == ("echo",)


def test_an_unknown_name_lists_what_is_installed() -> None:
    plugins = Plugins({"echo": offering("one", "two")})
    with pytest.raises(PluginError, match="no dataset named 'three'; installed: one, two"):
        plugins.find("dataset", "three")


def test_a_wrong_option_names_the_plugin_and_the_fields() -> None:
    plugins = Plugins({"echo": offering("echo")})
    with pytest.raises(ConfigError, match=r"plugin 'echo'(.|\n)*it takes: word"):
        plugins.make("dataset", "echo", {"wrd": "hi"})


def test_a_collision_names_both_sides() -> None:
    with pytest.raises(PluginError, match="offered by both 'one' and 'two'"):
        Plugins({"one": offering("echo"), "two": offering("echo")})


def test_a_misspelt_hook_is_refused() -> None:
    module = plugin("kat_echo", katcore_datsets=lambda: ())
    with pytest.raises(PluginError, match="katcore_datsets"):
        Plugins({"echo": module})


def test_an_observer_that_raises_stops_nobody() -> None:
    seen: list[StageFinished] = []

    def fails(event: StageFinished) -> None:
        raise RuntimeError("broken observer")

    def sees(event: StageFinished) -> None:
        seen.append(event)

    modules = {
        "fails": plugin("fails", katcore_stage_finished=fails),
        "sees": plugin("sees", katcore_stage_finished=sees),
    }
    event = StageFinished("sft", "uri", is_skipped=False, seconds=1.0)
    Plugins(modules).notify("katcore_stage_finished", event)
    assert seen == [event]
