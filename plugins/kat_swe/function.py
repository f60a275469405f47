"""The short functions of a module, and how a prompt shows them."""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

_MIN_LINES, _MAX_LINES = 2, 14
_MAX_CHARS = 330
_MAX_WIDTH = 88

Def = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a module. Lines count from 0; `lines` are those shown, in the whole function.

    `start` and `end` bound it from `def` on; `key` is what a call of it is known by: the line of its first
    decorator, from 1.
    """

    file: str
    name: str
    start: int
    end: int
    key: str
    source: tuple[str, ...]
    lines: tuple[int, ...]
    shown: tuple[str, ...]
    node: Def

    @property
    def text(self) -> str:
        """What the prompt shows, without numbers: the identity of a function."""
        return "\n".join(self.shown)


def functions(file: str, text: str) -> Iterator[Function]:
    """All functions and methods of a module that are short and plain enough."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.split("\n")
    for name, node in _definitions(tree, ""):
        start, end = node.lineno - 1, node.end_lineno or node.lineno
        first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
        found = read(file, name, start, f"{file}:{first}", tuple(lines[start:end]))
        if found:
            yield found


def read(file: str, name: str, start: int, key: str, source: tuple[str, ...]) -> Function | None:
    """The function whose lines are `source`; None if it is none, or not short and plain enough."""
    text = "\n".join(["if 1:" if source[0].startswith(" ") else "", *source, ""])
    try:
        tree = ast.parse(text)
        comments = _comments(text)
    except (SyntaxError, tokenize.TokenError):
        return None
    first = tree.body[0]
    node = first.body[0] if isinstance(first, ast.If) else first
    if not isinstance(node, Def):
        return None
    hidden = _docstring(node)
    numbers, shown = [], []
    for at, line in enumerate(source):
        code = line[: comments.get(at + 2, len(line))].rstrip()
        if code and at + 2 not in hidden:
            numbers.append(at)
            shown.append(code[node.col_offset :])
    end = start + len(source)
    result = Function(file, name, start, end, key, source, tuple(numbers), tuple(shown), node)
    return result if _is_plain(result) else None


def _definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Def]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Def):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions(node, prefix)


def _comments(text: str) -> dict[int, int]:
    """Column of the comment of each line that has one."""
    reader = tokenize.generate_tokens(io.StringIO(text).readline)
    return {item.start[0]: item.start[1] for item in reader if item.type == tokenize.COMMENT}


def _docstring(node: Def) -> range:
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return range(first.lineno, (first.end_lineno or first.lineno) + 1)
    return range(0)


def _is_plain(function: Function) -> bool:
    text = function.text
    return (
        _MIN_LINES <= len(function.shown) <= _MAX_LINES
        and len(text) <= _MAX_CHARS
        and max(map(len, function.shown)) <= _MAX_WIDTH
        and text.isascii()
        and '"""' not in text
        and "'''" not in text
        and "\t" not in text
        and "\\\n" not in text
    )
