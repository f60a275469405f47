"""A named thing that a plugin supplies."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel

ConfigT = TypeVar("ConfigT", bound=BaseModel)
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Offer(Generic[ConfigT, T_co]):
    """A named way to make a `T` from a config.

    Import heavy dependencies inside `make`: listing offers must stay cheap.
    """

    name: str
    config: type[ConfigT]
    make: Callable[[ConfigT], T_co]
    summary: str
