"""What a task kind draws: a folder of small files, what has to become of it, and ways to get there."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WORDS = (
    "apple", "bean", "bell", "bird", "boat", "book", "cake", "cat", "coin", "corn", "cup", "desk", "door",
    "duck", "fig", "fish", "fox", "gold", "hat", "kiwi", "lamp", "leaf", "lime", "lion", "milk", "moon",
    "nut", "owl", "pear", "pine", "plum", "rain", "ring", "rose", "sand", "ship", "snow", "star", "tea",
    "tree", "wolf", "wood",
)  # fmt: skip
UNUSED = ("box", "key", "map", "pen", "toy")
"""Words that name nothing in any scene: what a wrong first try says."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One instance of a kind.

    `files` are there at the start, `expected` at the end (everything, so that whatever else was changed
    counts as wrong). `checks` are bash conditions that run before the comparison, for what files do not
    show. `solve` are the turns that solve it; `look` one that only looks; `wrong` one that fails.
    """

    prompt: str
    files: Mapping[str, str]
    expected: Mapping[str, str]
    solve: Sequence[str]
    look: str = "ls"
    confirm: str = "ls"
    wrong: str = ""
    checks: Sequence[str] = ()
    commit: str = ""
    """If set, `files` are a git repository whose last commit has this message."""


class Draw:
    """A source of words, names and numbers, no word twice within one scene."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self._words = list(self.random.sample(WORDS, len(WORDS)))

    def word(self) -> str:
        """A word that the scene does not have yet."""
        return self._words.pop()

    def name(self, *suffixes: str) -> str:
        """A file name."""
        return self.word() + self.random.choice(suffixes or (".txt", ".log"))

    def number(self, low: int = 2, high: int = 99) -> int:
        """A number."""
        return self.random.randint(low, high)

    def lines(self, low: int = 3, high: int = 5) -> list[str]:
        """Lines of one word each."""
        return [self.word() for _ in range(self.random.randint(low, high))]

    def unused(self) -> str:
        """A word that is nowhere."""
        return self.random.choice(UNUSED)

    def others(self, num: int = 2) -> dict[str, str]:
        """Files that have nothing to do with it."""
        return {self.name(): f"{self.word()}\n" for _ in range(num)}


@dataclass(frozen=True, slots=True)
class Order:
    """Something to be done, in English, and its effect."""

    text: str
    command: str
    files: dict[str, str] = field(default_factory=dict)
    """Files it needs."""
    removes: tuple[str, ...] = ()
    adds: dict[str, str] = field(default_factory=dict)
    checks: tuple[str, ...] = ()

    def after(self, files: Mapping[str, str]) -> dict[str, str]:
        """`files` once it is done."""
        return {name: text for name, text in files.items() if name not in self.removes} | self.adds


def order(draw: Draw) -> Order:
    """One of five orders; which one cannot be guessed from the scene."""
    name, word = draw.name(), draw.word()
    content = {name: f"{draw.word()}\n"}
    match draw.random.randrange(5):
        case 0:
            return Order(f"delete {name}", f"rm {name}", content, (name,))
        case 1:
            return Order(f"make folder {word}", f"mkdir {word}", checks=(f"rmdir {word}",))
        case 2:
            new = draw.name()
            return Order(
                f"rename {name} to {new}",
                f"mv {name} {new}",
                content,
                (name,),
                {new: content[name]},
            )
        case 3:
            new = draw.name()
            return Order(
                f"copy {name} to {new}", f"cp {name} {new}", content, adds={new: content[name]}
            )
    return Order(f"write {word} into {name}", f"echo {word} > {name}", adds={name: f"{word}\n"})
