"""The mutation operators: edits of one line that turn a function into a plausible wrong one.

Where an edit may be made is read off the syntax tree; the edit itself touches only the tokens, so that the
rest of the text stays as it was. Every operator has its inverse among the operators: what repairs a mutant is
always one of the edits of the mutant.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from kat_swe.function import Function
from kat_swe.inside.edit import places, replaced, shortened, tokens

_BOUNDARY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_DIRECTION = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_EQUALITY = {"==": "!=", "!=": "=="}
_BINARY = {
    "+": ("arithmetic", "-"),
    "-": ("arithmetic", "+"),
    "*": ("arithmetic", "/"),
    "/": ("arithmetic", "*"),
    "//": ("arithmetic", "%"),
    "%": ("arithmetic", "//"),
    "&": ("bitwise", "|"),
    "|": ("bitwise", "&"),
    "<<": ("bitwise", ">>"),
    ">>": ("bitwise", "<<"),
}


def _both(*pairs: tuple[str, str]) -> dict[str, str]:
    return dict(pairs) | {second: first for first, second in pairs}


_BUILTIN = _both(
    ("min", "max"), ("any", "all"), ("int", "float"), ("str", "repr"), ("list", "tuple"),
    ("sorted", "reversed"), ("map", "filter"), ("len", "sum"), ("iter", "next"),
)  # fmt: skip
_METHOD = _both(
    ("startswith", "endswith"), ("lower", "upper"), ("lstrip", "rstrip"), ("find", "rfind"),
    ("split", "rsplit"), ("keys", "values"), ("append", "extend"), ("add", "discard"),
    ("index", "count"), ("pop", "popleft"), ("partition", "rpartition"), ("match", "search"),
    ("group", "groups"), ("title", "capitalize"), ("isdigit", "isalpha"),
)  # fmt: skip
_EXCEPTION = _both(
    ("KeyError", "IndexError"), ("TypeError", "ValueError"), ("AttributeError", "StopIteration")
)
_SLICE = _both(("[0]", "[-1]"), ("[1:]", "[:-1]"), ("[:1]", "[-1:]"), ("[::-1]", "[::1]"))


@dataclass(frozen=True, slots=True, order=True)
class Edit:
    """The `number`th (from 1) `old` of a function becomes `new`: what `fix "OLD NEW" NUMBER` does."""

    old: str
    new: str
    number: int = 1
    operator: str = ""

    @property
    def command(self) -> str:
        """The agent's command for it."""
        which = f" {self.number}" if self.number > 1 else ""
        new = shortened(self.old, self.new)
        return f'fix "{" ".join(filter(None, (self.old, new)))}"{which}'

    @property
    def is_plain(self) -> bool:
        """Whether bash and the tool take the command as it is meant."""
        return " " not in self.old and not any(mark in self.old + self.new for mark in '"$`\\')

    def apply(self, function: Function) -> tuple[str, ...] | None:
        """The function's source lines after the edit; None if it cannot be made."""
        found = list(_places(function, self.old))
        if self.number > len(found):
            return None
        at, start, end = found[self.number - 1]
        lines = list(function.source)
        lines[at] = replaced(lines[at], start, end, self.new)
        return tuple(lines)


def edit_at(
    function: Function, line: int, column: int, old: str, new: str, operator: str
) -> Edit | None:
    """The edit of the `old` at one place of the source; None if it is not shown there."""
    for number, (at, start, _) in enumerate(_places(function, old), 1):
        if (at, start) == (line, column):
            return Edit(old, new, number, operator)
    return None


def _places(function: Function, old: str) -> Iterator[tuple[int, int, int]]:
    for shown, start, end in places((function.source[at] for at in function.lines), old):
        yield function.lines[shown], start, end


@dataclass(frozen=True, slots=True)
class _Site:
    """A token in the file: line from 0 in the function, column, and what may become of it."""

    line: int
    column: int
    old: str
    new: str
    operator: str


def edits(function: Function) -> list[Edit]:
    """All edits of a function, in order."""
    found: dict[tuple[str, str, int], Edit] = {}
    for site in _Finder(function).sites():
        edit = edit_at(function, site.line, site.column, site.old, site.new, site.operator)
        if edit:
            found.setdefault((edit.old, edit.new, edit.number), edit)
    return sorted(found.values())


class _Finder:
    """Walks a function's tree; positions from its nodes, tokens from its text."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._node = function.node

    def sites(self) -> Iterator[_Site]:
        """All of them."""
        for node in ast.walk(self._node):
            name = f"_{type(node).__name__.lower()}"
            if hasattr(self, name):
                yield from getattr(self, name)(node)
            if isinstance(node, ast.Call):
                yield from self._order(node.args)
            if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load):
                yield from self._order(node.elts)

    def _between(self, left: ast.expr, right: ast.expr) -> Iterator[tuple[int, int, str]]:
        """Tokens after one expression and before another."""
        first, last = (left.end_lineno or 0), right.lineno
        for number in range(first, last + 1):
            at = number - self._node.lineno
            text = self._function.source[at]
            low = (left.end_col_offset or 0) if number == first else 0
            high = right.col_offset if number == last else len(text)
            for start, end, token in tokens(text[:high]):
                if start >= low and end <= high and not token.startswith("#"):
                    yield at, start, token

    def _before(self, node: ast.expr) -> Iterator[tuple[int, int, str]]:
        """The token before an expression, in its line."""
        at = node.lineno - self._node.lineno
        found = tokens(self._function.source[at][: node.col_offset])
        if found:
            yield at, found[-1][0], found[-1][2]

    def _at(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        return node.lineno - self._node.lineno, node.col_offset

    def _text(self, node: ast.expr) -> str:
        if node.lineno != node.end_lineno:
            return ""
        at, column = self._at(node)
        return self._function.source[at][column : node.end_col_offset]

    def _compare(self, node: ast.Compare) -> Iterator[_Site]:
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            for at, column, token in self._between(left, right):
                tables = (
                    ("boundary", _BOUNDARY),
                    ("direction", _DIRECTION),
                    ("equality", _EQUALITY),
                )
                for operator, table in tables:
                    if token in table:
                        yield _Site(at, column, token, table[token], operator)
                words = [text for _, _, text in self._between(left, right)]
                operator = "identity" if "is" in words else "membership"
                if token == "not":
                    yield _Site(at, column, "not", "", operator)
                elif token == "is" and "not" not in words:
                    yield _Site(at, column, "is", "is not", operator)
                elif token == "in" and "not" not in words:
                    yield _Site(at, column, "in", "not in", operator)

    def _binop(self, node: ast.BinOp) -> Iterator[_Site]:
        for at, column, token in self._between(node.left, node.right):
            if token in _BINARY:
                operator, new = _BINARY[token]
                yield _Site(at, column, token, new, operator)

    def _augassign(self, node: ast.AugAssign) -> Iterator[_Site]:
        for at, column, token in self._between(node.target, node.value):
            if token[:-1] in _BINARY:
                operator, new = _BINARY[token[:-1]]
                yield _Site(at, column, token, f"{new}=", operator)

    def _boolop(self, node: ast.BoolOp) -> Iterator[_Site]:
        for left, right in pairwise(node.values):
            for at, column, token in self._between(left, right):
                if token in {"and", "or"}:
                    new = "or" if token == "and" else "and"
                    yield _Site(at, column, token, new, "boolean")
        for value in node.values[1:]:
            yield from self._negation(value, ("and", "or"))

    def _unaryop(self, node: ast.UnaryOp) -> Iterator[_Site]:
        if isinstance(node.op, ast.Not):
            yield _Site(*self._at(node), "not", "", "negation")

    def _negation(self, value: ast.expr, words: tuple[str, ...]) -> Iterator[_Site]:
        is_negated = isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)
        for at, column, token in self._before(value):
            if token in words and not is_negated:
                yield _Site(at, column, token, f"{token} not", "negation")

    def _if(self, node: ast.If) -> Iterator[_Site]:
        yield from self._negation(_first(node.test), ("if", "elif"))

    def _while(self, node: ast.While) -> Iterator[_Site]:
        yield from self._negation(_first(node.test), ("while",))

    def _ifexp(self, node: ast.IfExp) -> Iterator[_Site]:
        yield from self._negation(_first(node.test), ("if",))

    def _constant(self, node: ast.Constant) -> Iterator[_Site]:
        text = self._text(node)
        if text in {"True", "False"}:
            yield _Site(*self._at(node), text, "False" if text == "True" else "True", "flag")
        elif text in {"0", "1"}:
            yield _Site(*self._at(node), text, "1" if text == "0" else "0", "constant")

    def _break(self, node: ast.Break) -> Iterator[_Site]:
        yield _Site(*self._at(node), "break", "continue", "loop")

    def _continue(self, node: ast.Continue) -> Iterator[_Site]:
        yield _Site(*self._at(node), "continue", "break", "loop")

    def _name(self, node: ast.Name) -> Iterator[_Site]:
        for operator, table in (("builtin", _BUILTIN), ("exception", _EXCEPTION)):
            if node.id in table and isinstance(node.ctx, ast.Load):
                yield _Site(*self._at(node), node.id, table[node.id], operator)

    def _attribute(self, node: ast.Attribute) -> Iterator[_Site]:
        if node.attr in _METHOD and node.lineno == node.end_lineno:
            at = node.lineno - self._node.lineno
            column = (node.end_col_offset or 0) - len(node.attr)
            yield _Site(at, column, node.attr, _METHOD[node.attr], "method")

    def _subscript(self, node: ast.Subscript) -> Iterator[_Site]:
        if node.value.end_lineno == node.end_lineno:
            at, column = (node.end_lineno or 0) - self._node.lineno, node.value.end_col_offset or 0
            old = self._function.source[at][column : node.end_col_offset]
            if old in _SLICE:
                yield _Site(at, column, old, _SLICE[old], "slice")

    def _yield(self, node: ast.Yield) -> Iterator[_Site]:
        at, column = self._at(node)
        if node.value and not self._function.source[at][:column].strip():
            yield _Site(at, column, "yield", "return", "yield")

    def _return(self, node: ast.Return) -> Iterator[_Site]:
        if node.value is None:
            return
        yield _Site(*self._at(node), "return", "yield", "yield")
        if node.lineno == node.value.lineno and _can_stand_alone(node.value):
            yield _Site(*self._at(node), "return", "", "return")

    def _expr(self, node: ast.Expr) -> Iterator[_Site]:
        if _can_stand_alone(node.value):
            at, column = self._at(node)
            first = tokens(self._function.source[at][column:])[0][2]
            yield _Site(at, column, first, f"return {first}", "return")

    def _order(self, items: list[ast.expr]) -> Iterator[_Site]:
        for left, right in pairwise(items):
            first, second = self._text(left), self._text(right)
            is_simple = all(isinstance(item, ast.Name | ast.Constant) for item in (left, right))
            at, column = self._at(left)
            text = self._function.source[at][column : right.end_col_offset]
            if is_simple and first != second and text == f"{first}, {second}":
                yield _Site(at, column, f"{first},{second}", f"{second}, {first}", "order")


def _first(node: ast.expr) -> ast.expr:
    """The expression that a condition starts with."""
    while True:
        if isinstance(node, ast.BoolOp):
            node = node.values[0]
        else:
            return node


def _can_stand_alone(node: ast.expr) -> bool:
    return isinstance(node, ast.Call | ast.BinOp | ast.Name | ast.Subscript | ast.Compare)
