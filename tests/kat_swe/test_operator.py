"""Every operator's bug is taken back by one edit, to the letter."""

import argparse
import ast
import collections
import configparser
import csv
import difflib
import fractions
import heapq
import inspect
import shlex
import statistics
import textwrap
import textwrap as wrap
from types import ModuleType

import pytest

from kat_swe.function import Function, functions
from kat_swe.inside.edit import meant, places, replaced, shortened
from kat_swe.mutant import mutants
from kat_swe.operator import Edit, edits

MODULES = (
    argparse,
    collections,
    configparser,
    csv,
    difflib,
    fractions,
    heapq,
    shlex,
    statistics,
    wrap,
)

EXAMPLES = {
    "boundary": ("if a < b:", "if a <= b:"),
    "direction": ("if a < b:", "if a > b:"),
    "equality": ("if a == b:", "if a != b:"),
    "identity": ("if a is b:", "if a is not b:"),
    "membership": ("if a not in b:", "if a in b:"),
    "arithmetic": ("a += b", "a -= b"),
    "bitwise": ("a = a | b", "a = a & b"),
    "boolean": ("if a and b:", "if a or b:"),
    "negation": ("if a:", "if not a:"),
    "constant": ("a = f(0)", "a = f(1)"),
    "flag": ("f(x=True)", "f(x=False)"),
    "builtin": ("a = min(b)", "a = max(b)"),
    "method": ("a.startswith(b)", "a.endswith(b)"),
    "exception": ("raise KeyError(a)", "raise IndexError(a)"),
    "slice": ("a = b[1:]", "a = b[:-1]"),
    "order": ("f(a, b)", "f(b, a)"),
    "return": ("return f(a)", "f(a)"),
    "yield": ("yield a", "return a"),
}


def function(line: str) -> Function:
    body = f"    {line}" + ("\n        pass" if line.endswith(":") else "")
    (found,) = functions("m.py", f"def g(a, b):\n{body}\n")
    return found


@pytest.mark.parametrize("operator", EXAMPLES)
def test_an_operator_makes_its_edit_and_the_way_back(operator: str) -> None:
    right, wrong = EXAMPLES[operator]
    for before, after in ((function(right), function(wrong)), (function(wrong), function(right))):
        made = [edit for edit in edits(before) if edit.operator == operator]
        assert after.source in [edit.apply(before) for edit in made]


def test_break_and_continue() -> None:
    text = "def g(a):\n    for b in a:\n        break\n"
    (found,) = functions("m.py", text)
    assert Edit("break", "continue", operator="loop") in edits(found)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_repair_restores_the_exact_source(module: ModuleType) -> None:
    text = inspect.getsource(module)
    num = 0
    for found in functions("m.py", text):
        for mutant in mutants(text, found):
            assert mutant.text != text
            ast.parse(mutant.text)
            lines = mutant.text.split("\n")
            changed = [at for at, line in enumerate(text.split("\n")) if line != lines[at]]
            assert len(changed) == 1
            assert found.start <= changed[0] < found.end
            assert mutant.repair.apply(mutant.function) == found.source
            assert mutant.repair in edits(mutant.function)
            num += 1
    assert num > 3


def test_shown_source_has_no_comment_and_no_docstring() -> None:
    text = textwrap.dedent('''
        class A:
            def f(self, a):
                """Says so."""
                # a note

                return a[0]  # the first
    ''')
    (found,) = functions("m.py", text)
    assert found.shown == ("def f(self, a):", "    return a[0]")
    assert found.name == "A.f"


@pytest.mark.parametrize(
    ("line", "old", "new", "wanted"),
    [
        ("if a <= b:", "<", "<=", None),
        ("if a < b < c:", "<", "<=", "if a <= b < c:"),
        ("if not a:", "not", "", "if a:"),
        ("if a:", "if", "if not", "if not a:"),
        ("f(b, a)", "b,a", "a, b", "f(a, b)"),
        ("x = '<' < y", "<", ">", "x = '<' > y"),
        ("a = b[-1]", "[-1]", "[0]", "a = b[0]"),
        ("f(a)", "", "x", None),
    ],
)
def test_an_edit_replaces_whole_tokens(line: str, old: str, new: str, wanted: str | None) -> None:
    found = [replaced(line, start, end, new) for _, start, end in places([line], old)]
    assert found[:1] == ([wanted] if wanted else [])


def test_edits_count_the_places_of_a_token_over_the_shown_lines() -> None:
    text = (
        'def g(a):\n    """Not 0."""\n    if a == 0:  # or 0\n        return 0\n    return a[0]\n'
    )
    (found,) = functions("m.py", text)
    for number, line in ((1, "    if a == 1:  # or 0"), (2, "        return 1")):
        changed = Edit("0", "1", number).apply(found)
        assert changed
        assert line in changed
        assert Edit("0", "1", number, "constant") in edits(found)
    assert Edit("0", "1", 4).apply(found) is None


def test_a_command_is_one_quoted_string_and_the_place_where_it_is_not_the_first() -> None:
    assert Edit("<", "<=").command == 'fix "< <="'
    assert Edit("not", "", 2).command == 'fix "not" 2'


@pytest.mark.parametrize(
    ("old", "new", "short"),
    [
        ("rows", "return rows", "return @"),
        ("if", "if not", "@ not"),
        ("in", "not in", "not @"),
        ("a,b", "b, a", "~"),
        ("a,0", "0, a", "~"),
        ("a,b", "a, b", "a, b"),
        ("<", "<=", "<="),
        ("re", "return re", "return @"),
        ("not", "", ""),
    ],
)
def test_a_command_names_what_it_replaces_once(old: str, new: str, short: str) -> None:
    assert shortened(old, new) == short
    assert meant(old, short) == new
