"""Trees larger than memory: cut into parts, each computed once, with gradients relayed from part to part.

A part sees its path through the keys and values of the parts above, which it takes as they are; the gradient
that it has for them is given to the part above before that goes backwards itself (Tree Training, arXiv
2511.00413, partitioning without redundancy). So what is held at once are the activations of the parts on one
path. Departs from the paper in where it cuts: along the heaviest chain, in pieces of at least a sixteenth of
what may be held, also inside a node; what hangs off a piece goes into as few parts as fit.

Proven equal to the whole tree in tests/train/test_partition.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from katcore.train.forest import depths, subtree_sizes

_PIECES = 16


@dataclass(slots=True)
class Part:
    """Tokens of a tree in depth-first order, the path of tokens above them, and the parts that hang off them.

    If other parts do, then the part begins with a chain that continues the path, and they see the path and a
    beginning of that chain.
    """

    tokens: list[int]
    path: list[int]
    parts: list["Part"] = field(default_factory=list)

    @property
    def num_held(self) -> int:
        """How many tokens' activations are held at once, at most."""
        return len(self.tokens) + max((part.num_held for part in self.parts), default=0)


def plan(parents: Sequence[int], max_tokens: int) -> Part:
    """The parts of a tree, or forest, that lies depth first with the largest subtree first.

    At most `max_tokens` are held at once, or about as many as the longest path has, if that is longer. The
    first part has no tokens: all trees hang off it.
    """
    limit = max(max_tokens, 1 + max(depths(parents)))
    return _Planner(parents, limit).plan()


class _Planner:
    def __init__(self, parents: Sequence[int], limit: int) -> None:
        self._parents = parents
        self._limit = limit
        self._sizes = subtree_sizes(parents)
        self._children: list[list[int]] = [[] for _ in parents]
        self._roots: list[int] = []
        for token, parent in enumerate(parents):
            (self._children[parent] if parent >= 0 else self._roots).append(token)

    def plan(self) -> Part:
        whole = Part([], [])
        open_parts = [(whole, self._roots, 0)]
        while open_parts:
            above, tops, held = open_parts.pop()
            for part in self._bundles(tops, above, self._limit - held):
                above.parts.append(part)
            for top in tops:
                if self._sizes[top] > self._limit - held:
                    chain = self._chain(top)
                    part = Part(chain, self._path(above, top))
                    above.parts.append(part)
                    open_parts.append((part, self._below(chain), held + len(chain)))
        return whole

    def _bundles(self, tops: Sequence[int], above: Part, room: int) -> list[Part]:
        """What fits, in as few parts as do in order."""
        found: list[Part] = []
        for top in tops:
            size = self._sizes[top]
            if size <= room:
                if not found or len(found[-1].tokens) + size > room:
                    found.append(Part([], above.path + above.tokens))
                found[-1].tokens.extend(range(top, top + size))
        return found

    def _chain(self, top: int) -> list[int]:
        """The heaviest chain from a token on: to its first fork, or further, to a useful length."""
        chain = [top]
        has_forked = False
        while below := self._children[chain[-1]]:
            has_forked = has_forked or len(below) > 1
            if has_forked and len(chain) >= self._limit // _PIECES:
                break
            chain.append(below[0])
        return chain

    def _below(self, chain: list[int]) -> list[int]:
        """Depth first: what hangs off the end of the chain comes first."""
        inside = set(chain)
        below = (child for token in chain for child in self._children[token])
        return sorted(child for child in below if child not in inside)

    def _path(self, above: Part, top: int) -> list[int]:
        if (parent := self._parents[top]) < 0:
            return []
        own = above.tokens.index(parent) + 1
        return above.path + above.tokens[:own]
