"""Modules, functions and Protocols stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path for folder in ("katcore", "plugins", "dags") for path in (ROOT / folder).rglob("*.py")
)
IDS = [str(path.relative_to(ROOT)) for path in MODULES]


def length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_a_module_fits_the_budget(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert length(node) <= 80, f"{node.name} has {length(node)} lines"


def test_nine_in_ten_modules_and_functions_are_short() -> None:
    modules = sorted(len(path.read_text().splitlines()) for path in MODULES)
    functions = sorted(
        length(node)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert modules[len(modules) * 9 // 10] <= 350
    assert functions[len(functions) * 9 // 10] <= 30


def test_a_protocol_has_at_most_four_methods() -> None:
    tree = ast.parse((ROOT / "katcore" / "protocols.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if hasattr(item, "args")]
            assert len(methods) <= 4, node.name


def test_airflow_executes_no_file_of_plugins() -> None:
    assert (ROOT / "plugins" / ".airflowignore").read_text() == "*\n"
