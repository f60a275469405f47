"""How far two sequences agree from their beginning."""

from collections.abc import Sequence


def num_common(mine: Sequence[object], theirs: Sequence[object]) -> int:
    """How many items the two begin with in common."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
