"""One edit of one line: `OLD` becomes `NEW`. Shared by the agent's tool and by what makes the bugs."""

import re

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


def find(line: str, old: str) -> tuple[int, int] | None:
    """Where the tokens of `old` first stand in `line`, one after the other."""
    wanted = [text for _, _, text in tokens(old)]
    found = tokens(line)
    for first in range(len(found) - len(wanted) + 1 if wanted else 0):
        part = found[first : first + len(wanted)]
        if [text for _, _, text in part] == wanted:
            return part[0][0], part[-1][1]
    return None


def replaced(line: str, old: str, new: str) -> str | None:
    """`line` with the first `old` replaced, or without it where `new` is empty; None if it has none."""
    where = find(line, old)
    if where is None:
        return None
    before, after = line[: where[0]], line[where[1] :]
    return before + new + (after if new else after.removeprefix(" "))
