"""Weights that a pip package carries, converted once to a Hugging Face folder."""

from pathlib import Path


def convert(requirement: str, out: Path) -> dict[str, float]:
    """Convert."""
    raise NotImplementedError
