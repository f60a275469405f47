"""Writes the pages of docs/reference/ that `PAGES` names from the live objects; `--check` compares."""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from katcore import config, protocols
from katcore.cli import app
from katcore.pipeline.collection import Choice, CollectionConfig
from katcore.pipeline.training import CONFIGS, DomainConfig
from katcore.plugin import Offer, Plugins, hookspecs
from katcore.testing.redteam.tricks import TRICKS

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
_NOTE = "<!-- Written by scripts/reference.py; do not edit. -->\n\n"


def hooks() -> str:
    """Every hook, the offer record, and the Protocols that offers make."""
    parts = [
        "# Hooks\n\n",
        _NOTE,
        "A plugin is a module that an installed package names in the entry-point group `katcore`. It"
        " implements any of these functions with `@hookimpl` from `katcore.plugin`. Offer hooks are called"
        " once, and a run picks from what they return by name; observer hooks are told what happened.\n\n",
    ]
    for name, value in vars(hookspecs).items():
        if name.startswith("katcore_"):
            parts.append(_function(f"`{name}`", value))
    parts.append(f"## `Offer`\n\n{inspect.getdoc(Offer)}\n\n{_fields(Offer)}\n")
    parts.append(
        "# Protocols\n\nWhat an offer's `make` returns, in the order a rollout uses them.\n\n"
    )
    tree = ast.parse(inspect.getsource(protocols))
    parts += [_protocol(node) for node in tree.body if isinstance(node, ast.ClassDef)]
    return "".join(parts)


def cli() -> str:
    """Every verb of `kat` with its options."""
    group: Any = typer.main.get_command(app)
    parts = ["# Command line\n\n", _NOTE, f"{group.help}\n\n"]
    for name, command in sorted(_verbs(group)):
        parts.append(f"## `kat {name}`\n\n{inspect.cleandoc(command.help or '')}\n\n")
        options = [_option(option) for option in command.params if option.name != "help"]
        if options:
            parts.append("| option | default | |\n|---|---|---|\n" + "".join(options) + "\n")
    return "".join(parts).rstrip() + "\n"


def _verbs(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _verbs(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def settings() -> str:
    """Every key of a preset, the presets, and the environment variables."""
    parts = [
        "# Settings\n\n",
        _NOTE,
        "A preset is a YAML file; a run takes one by name or by path (`--preset`). A key that is not listed"
        " here is an error. What a file leaves out has the default.\n\n## Presets\n\n",
    ]
    for name in config.preset_names():
        path = Path(config.__file__).parent / "presets" / f"{name}.yaml"
        parts.append(f"- `{name}`: {yaml.safe_load(path.read_text())['summary']}\n")
    parts.append("\n")
    parts += _sections(config.Preset)
    parts.append("## Environment variables\n\n")
    for value in vars(config).values():
        text = inspect.getdoc(value) if inspect.isfunction(value) else ""
        if found := re.search(r"\$(KATCORE_\w+)", text or ""):
            parts.append(f"- `{found.group(1)}`: {' '.join((text or '').split())}\n")
    return "".join(parts)


def collections() -> str:
    """Every key of a collection."""
    head = "# Collections\n\n" + _NOTE
    said = "What the file of `kat collect FILE` may say; [how to](../how-to/collect.md).\n\n"
    return "".join([head, said, *_sections(CollectionConfig)]).rstrip() + "\n"


def trainings() -> str:
    """Every key of the files of `kat sft`, `kat rl` and `kat distill`."""
    parts = [
        "# Training from a file\n\n",
        _NOTE,
        "What the file of `kat sft|rl|distill FILE` may say; [how to](../how-to/train.md). The keys of the"
        " sections `sft`, `rl`, `distill` and `serve` are those of a [preset](config.md).\n\n",
    ]
    for verb, kind in CONFIGS.items():
        parts.append(f"## `kat {verb}`\n\n{_said(kind)}\n\n{_keys(kind)}\n")
    parts.append(
        f"## `domains` of `kat distill`\n\n{_said(DomainConfig)}\n\n{_keys(DomainConfig)}\n"
    )
    return "".join(parts).rstrip() + "\n"


def _said(kind: type[BaseModel]) -> str:
    """What a config and those that it extends say."""
    own = (item for item in kind.__mro__ if item.__module__ == kind.__module__)
    return "\n\n".join(inspect.cleandoc(item.__doc__ or "") for item in own)


def offers() -> str:
    """The options of every offer that ships."""
    parts = ["# Offers\n\n", _NOTE, "What ships with katcore, and the options of each.\n\n"]
    for item in Plugins.installed().everything():
        if item.offer and item.package.startswith("kat_"):
            parts.append(f"## {item.kind} `{item.name}`\n\n{item.summary}. ")
            parts.append(f"{inspect.getdoc(item.offer.config)}\n\n{_keys(item.offer.config)}\n")
    return "".join(parts).rstrip() + "\n"


def _sections(top: type[BaseModel]) -> Iterator[str]:
    for model, keys in _models(top).items():
        where = "`, `".join(keys)
        title = f"`{where}`" if where else "Top level"
        yield f"## {title}\n\n{inspect.getdoc(model)}\n\n{_keys(model)}\n"


def red_team() -> str:
    """The known tricks, and what comes of each."""
    parts = [
        "# The red team\n\n",
        _NOTE,
        "What agents do to be rewarded without doing the task. `katcore.testing.redteam.RedTeam` attempts"
        " each of these in real sandboxes and their grading ([how](../how-to/sandboxes.md)). *Works naively*:"
        " the suite also shows that the trick succeeds where history and solution are in the agent's own"
        " sandbox, and the tests are run there.\n\n"
        "| trick | the agent | stopped because | comes to | works naively |\n"
        "|---|---|---|---|---|\n",
    ]
    for trick in TRICKS:
        end = f"flagged: `{trick.flag}`" if trick.flag else "contained"
        end = f"contained, or {end}" if trick.is_fixed else end
        naive = "yes" if trick.naive else ""
        parts.append(f"| `{trick.name}` | {trick.tries} | {trick.stopped} | {end} | {naive} |\n")
    return "".join(parts)


PAGES: dict[str, Callable[[], str]] = {
    "hooks.md": hooks,
    "cli.md": cli,
    "config.md": settings,
    "collection.md": collections,
    "training.md": trainings,
    "offers.md": offers,
    "red-team.md": red_team,
}


def _function(title: str, value: Any) -> str:
    node = ast.parse(inspect.getsource(value)).body[0]
    assert isinstance(node, ast.FunctionDef)
    return f"## {title}\n\n```python\n{_signature(node)}\n```\n\n{inspect.getdoc(value)}\n\n"


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{prefix} {node.name}({ast.unparse(node.args)}){returns}"


def _protocol(node: ast.ClassDef) -> str:
    text = f"## `{node.name}`\n\n{ast.get_docstring(node)}\n\n"
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            said = ast.get_docstring(item) or ""
            text += f"```python\n{_signature(item)}\n```\n\n{said}\n\n"
    return text


def _fields(record: Any) -> str:
    names = ", ".join(f"`{name}`" for name in record.__dataclass_fields__)
    return f"Fields: {names}.\n"


def _option(option: Any) -> str:
    default = f"`{option.default}`" if str(option.default) not in {"", "None", "False"} else ""
    names = ", ".join(f"`{name}`" for name in option.opts)
    return f"| {names} | {default} | {getattr(option, 'help', None) or ''} |\n"


def _models(model: type[BaseModel], key: str = "") -> dict[type[BaseModel], list[str]]:
    """A class of settings and all in it, and the keys that each is found under."""
    found = {model: [key]}
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                for inner, keys in _models(kind, f"{key}.{name}".lstrip(".")).items():
                    found.setdefault(inner, []).extend(keys)
    return found


def _keys(model: type[BaseModel]) -> str:
    lines = ["| key | type | default |\n|---|---|---|\n"]
    for name, field in model.model_fields.items():
        kind = field.annotation
        shown = kind.__name__ if isinstance(kind, type) and kind.__module__ != "builtins" else None
        text = shown or (kind.__name__ if kind in (int, float, str, bool) else str(kind))
        text = re.sub(r"\b(?:[a-z_]+\.)+", "", text).replace("|", "or")
        lines.append(f"| `{name}` | {text} | {_default(field)} |\n")
    return "".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory_takes_validated_data:
        return "see above"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Choice):
        default = default.name
    return "see below" if isinstance(default, BaseModel) else f"`{default!r}`"


def main() -> int:
    """Write the pages, or with `--check` name those that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    stale = []
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        path, text = FOLDER / name, make()
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not is_check:
                path.write_text(text)
    sys.stdout.write(f"{'stale' if is_check else 'written'}: {', '.join(stale) or 'nothing'}\n")
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
