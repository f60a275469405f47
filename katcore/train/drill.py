"""Generic conversations for pretraining: copying, looking up, counting lines, replacing.

They name no command and no task of any expert. A small model learns from them to carry symbols from
its context into its answer, which is what takes longest to learn (see docs/experiments.md). Their lines are
words, or source text of the standard library.
"""

import random
import re
from collections.abc import Callable, Sequence

_SYMBOL = re.compile(r"\w+|[<>=!]=|[^\w\s]")
Conversation = list[tuple[str, str]]
"""(what the user says, what the assistant answers) pairs."""


class Drills:
    """Draws conversations over a list of words and the lines of some source text."""

    def __init__(self, words: Sequence[str], lines: Sequence[str], seed: int) -> None:
        self._words = words
        self._lines = lines
        self._random = random.Random(seed)
        self._kinds: tuple[Callable[[], Conversation], ...] = (
            self._copy,
            self._look_up,
            self._line,
            self._find,
            self._replace,
            self._recall,
            self._code_line,
            self._code_find,
            self._code_replace,
        )

    def draw(self) -> Conversation:
        """One conversation."""
        return self._random.choice(self._kinds)()

    def draw_first(self) -> Conversation:
        """One of the two shortest kinds: all that is to learn there is to copy."""
        return self._random.choice((self._copy, self._copy, self._recall))()

    def _word(self) -> str:
        """A word, a made-up word, a number or a file name."""
        pick = self._random.random()
        if pick < 0.15:
            return str(self._random.randrange(100))
        word = self._random.choice(self._words)
        if pick < 0.4:
            made_up = "".join(
                self._random.choice("bcdfgklmnprst") + self._random.choice("aeiou") for _ in "ab"
            )
            word = made_up + self._random.choice("nrstkl")
        if pick > 0.7:
            word += self._random.choice((".txt", ".py", ".log", "/", "()", "_id", ".json"))
        return word

    def _some(self, low: int, high: int) -> list[str]:
        return [self._word() for _ in range(self._random.randint(low, high))]

    def _copy(self) -> Conversation:
        text = " ".join(self._some(1, 5))
        wording = self._random.choice(("Say {}", "Repeat: {}", "Write {} again.", "copy {}"))
        return [(wording.format(text), text)]

    def _look_up(self) -> Conversation:
        pairs = dict(zip(self._some(2, 5), self._some(5, 5), strict=False))
        mark = self._random.choice((": ", "=", " "))
        listing = "\n".join(f"{key}{mark}{value}" for key, value in pairs.items())
        key = self._random.choice(list(pairs))
        return [(f"{listing}\nWhat is {key}?", pairs[key])]

    def _line(self) -> Conversation:
        lines = [" ".join(self._some(1, 4)) for _ in range(self._random.randint(2, 6))]
        number = self._random.randint(1, len(lines))
        return [(f"{_numbered(lines)}\nLine {number}?", lines[number - 1])]

    def _find(self) -> Conversation:
        lines = [self._some(1, 4) for _ in range(self._random.randint(2, 6))]
        listing = _numbered([" ".join(line) for line in lines])
        number = self._random.randint(1, len(lines))
        word = self._random.choice(lines[number - 1])
        return [(f"{listing}\nWhich line has {word}?", f"{number} {word}")]

    def _replace(self) -> Conversation:
        text = self._some(2, 5)
        old, new = self._random.choice(text), self._word()
        changed = " ".join(new if word == old else word for word in text)
        return [(f"In '{' '.join(text)}' put {new} for {old}.", changed)]

    def _code(self) -> list[str]:
        num = self._random.randint(2, 8)
        start = self._random.randrange(len(self._lines) - num)
        return list(self._lines[start : start + num])

    def _code_line(self) -> Conversation:
        lines = self._code()
        number = self._random.randint(1, len(lines))
        return [(f"{_numbered(lines)}\nLine {number}?", lines[number - 1].strip())]

    def _code_find(self) -> Conversation:
        """A symbol, and the first line that has it."""
        lines = self._code()
        symbol = self._random.choice(_symbols(self._random.choice(lines)))
        number = next(at for at, line in enumerate(lines, 1) if symbol in _symbols(line))
        return [(f"{_numbered(lines)}\nWhich line has {symbol} ?", f"{number} {symbol}")]

    def _code_replace(self) -> Conversation:
        """One symbol of one line for another of the same text."""
        lines = self._code()
        number = self._random.randint(1, len(lines))
        old = self._random.choice(_symbols(lines[number - 1]))
        new = self._random.choice(_symbols(self._random.choice(lines)))
        at = next(item for item in _SYMBOL.finditer(lines[number - 1]) if item.group() == old)
        line = lines[number - 1]
        changed = f"{line[: at.start()]}{new}{line[at.end() :]}".strip()
        return [(f"{_numbered(lines)}\nIn line {number} put {new} for {old} .", changed)]

    def _recall(self) -> Conversation:
        first, second = self._word(), self._word()
        opening = self._random.choice(("Remember {}.", "The word is {}.", "Keep {} in mind."))
        ask = self._random.choice(("Now say it.", "Which word was it?", "Add {} to it."))
        answer = f"{first} {second}" if "{}" in ask else first
        return [(opening.format(first), "ok"), (ask.format(second), answer)]


def _numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"{number} {line}" for number, line in enumerate(lines, 1))


def _symbols(line: str) -> list[str]:
    return _SYMBOL.findall(line)
