"""GPUs as data: memory as the driver reports it; bfloat16 flops (dense) and bandwidth of the data sheets."""

import re
from dataclasses import dataclass

from katcore.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU. Where only its memory is known, `flops` and `bytes_per_s` are 0."""

    name: str
    memory: int
    flops: float = 0.0
    bytes_per_s: float = 0.0


_MIB = 1 << 20
CARDS = {
    card.name.lower(): card
    for card in (
        Card("L4", 23034 * _MIB, 121e12, 0.30e12),
        Card("RTX4090", 24564 * _MIB, 165e12, 1.01e12),
        Card("L40S", 46068 * _MIB, 362e12, 0.86e12),
        Card("A100", 81920 * _MIB, 312e12, 2.04e12),
        Card("H100", 81559 * _MIB, 989e12, 3.35e12),
        Card("H200", 143771 * _MIB, 989e12, 4.80e12),
        Card("B200", 183359 * _MIB, 2250e12, 8.00e12),
    )
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(GiB|GB)", re.IGNORECASE)


def find_card(text: str) -> Card:
    """A card by its name, or by its memory, such as `80GiB`.

    Raises:
        ConfigError: neither; lists the known names.
    """
    if card := CARDS.get(text.strip().lower()):
        return card
    if found := _SIZE.fullmatch(text.strip()):
        unit = GIB if found[2].lower() == "gib" else 10**9
        return Card(text.strip(), int(float(found[1]) * unit))
    names = ", ".join(card.name for card in CARDS.values())
    raise ConfigError(f"no GPU {text!r}; give its memory, such as 80GiB, or one of: {names}")
