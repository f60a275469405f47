"""One edit of a function: its Nth `OLD` becomes `NEW`. The agent's tool and the maker of bugs share it."""

import re
from collections.abc import Iterable, Iterator

_TOKEN = re.compile(
    r"""\#.*
    | [rbfuRBFU]{0,2}(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    | [A-Za-z_]\w*
    | \d[\w.]*
    | \*\*=|//=|>>=|<<=|\.\.\.|->|:=|[=!<>+\-*/%&|^]=|\*\*|//|<<|>>
    | [^\s\w]""",
    re.VERBOSE,
)


def tokens(text: str) -> list[tuple[int, int, str]]:
    """The Python tokens of a line: start, end, text."""
    return [(match.start(), match.end(), match.group()) for match in _TOKEN.finditer(text)]


def places(lines: Iterable[str], old: str) -> Iterator[tuple[int, int, int]]:
    """Where the tokens of `old` stand one after the other: index of the line, start, end."""
    wanted = [text for _, _, text in tokens(old)]
    for at, line in enumerate(lines):
        found = tokens(line)
        for first in range(len(found) - len(wanted) + 1 if wanted else 0):
            part = found[first : first + len(wanted)]
            if [text for _, _, text in part] == wanted:
                yield at, part[0][0], part[-1][1]


def replaced(line: str, start: int, end: int, new: str) -> str:
    """`line` with other text at one place; where `new` is empty, without the space that followed."""
    after = line[end:]
    return line[:start] + new + (after if new else after.removeprefix(" "))


def meant(old: str, new: str) -> str:
    """What `old` becomes: in `new`, `@` stands for it; `~` is its two sides of a comma, changed over."""
    left, comma, right = old.partition(",")
    if new == "~" and comma:
        return f"{right}, {left}"
    return new.replace("@", old)


def shortened(old: str, new: str) -> str:
    """The `new` that says the same without repeating `old`."""
    if "," in old and meant(old, "~") == new:
        return "~"
    words = ["@" if word == old else word for word in new.split(" ")]
    return " ".join(words)
