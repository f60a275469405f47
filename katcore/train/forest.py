"""Where in a row the tokens of a tree are, so that what they see makes few and large rectangles.

Depth first, the largest subtree first: the tokens of a chain (from a token to its child with the most tokens
below, and so on to a leaf) lie side by side, and so do all that hang off one of its tokens. Those see the
chain up to there: one rectangle, without a mask. A token is in as many rectangles as its path leaves chains,
at most log2 of the number of leaves.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Queries [start, end) see keys [first, last): all of them, or if it is causal those up to themselves."""

    start: int
    end: int
    first: int
    last: int
    is_causal: bool

    @property
    def num_pairs(self) -> int:
        """How many pairs of a query and a key that it sees."""
        num = self.end - self.start
        return num * (num + 1) // 2 if self.is_causal else num * (self.last - self.first)


def is_line(parents: Sequence[int]) -> bool:
    """Whether a tree has one branch, in order."""
    return all(parent == token - 1 for token, parent in enumerate(parents))


def subtree_sizes(parents: Sequence[int]) -> list[int]:
    """How many tokens each token has below it, with itself. Parents come before their children."""
    sizes = [1] * len(parents)
    for token in range(len(parents) - 1, -1, -1):
        if parents[token] >= 0:
            sizes[parents[token]] += sizes[token]
    return sizes


def leaves(parents: Sequence[int]) -> list[int]:
    """The tokens that nothing hangs off, in order."""
    return sorted(set(range(len(parents))) - set(parents))


def branches(parents: Sequence[int]) -> list[list[int]]:
    """The tokens of each path from a root to a leaf, in order of the leaves."""
    found = []
    for leaf in leaves(parents):
        path = [leaf]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        found.append(path[::-1])
    return found


def heavy_first(parents: Sequence[int]) -> list[int]:
    """The tokens depth first, the largest subtree first."""
    sizes = subtree_sizes(parents)
    children: list[list[int]] = [[] for _ in parents]
    stack: list[int] = []
    for token, parent in enumerate(parents):
        (children[parent] if parent >= 0 else stack).append(token)
    stack.sort(key=lambda token: (sizes[token], -token))
    order: list[int] = []
    while stack:
        token = stack.pop()
        order.append(token)
        if len(below := children[token]) > 1:
            below.sort(key=lambda child: (sizes[child], -child))
        stack += below
    return order


def renumbered(parents: Sequence[int], order: Sequence[int]) -> list[int]:
    """The parents of the tokens in `order`, as places in it."""
    place = [0] * len(parents)
    for at, token in enumerate(order):
        place[token] = at
    return [place[parent] if (parent := parents[token]) >= 0 else -1 for token in order]


def depths(parents: Sequence[int]) -> list[int]:
    """How many tokens are above each token."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


def pieces(parents: Sequence[int], num_past: int = 0) -> list[Piece]:
    """What the tokens of a forest in depth-first order see, as pieces that do not overlap.

    The first `num_past` tokens are one path, of which only the keys are there: queries are counted from the
    first token after it. Causal pieces come first, and each query is in one of them.
    """
    sizes = subtree_sizes(parents)
    chains: list[Piece] = []
    hanging: dict[int, Piece] = {}
    start_of: list[int] = []
    start = 0
    for token, parent in enumerate(parents):
        if parent != token - 1 or token in (0, num_past):
            if token > num_past:
                chains.append(_chain(start, token, num_past))
            start = token
            if parent >= 0 and token >= num_past:
                begin, end = token - num_past, token + sizes[token] - num_past
                before = hanging.get(parent)
                hanging[parent] = Piece(
                    before.start if before else begin, end, start_of[parent], parent + 1, False
                )
        start_of.append(start)
    if len(parents) > num_past:
        chains.append(_chain(start, len(parents), num_past))
    return chains + list(hanging.values())


def _chain(start: int, end: int, num_past: int) -> Piece:
    return Piece(start - num_past, end - num_past, start, end, True)
