"""The embedded engine as an offer. Imports torch only when one is made."""

from importlib import import_module
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from katcore.protocols import Engine


class EmbeddedConfig(BaseModel):
    """Options: the model folder, how many conversations at once, and their length in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    num_slots: int = 64
    context: int = 1024
    seed: int = 0


def make_embedded(config: EmbeddedConfig) -> Engine:
    """Load the folder."""
    engine: Engine = import_module("katcore.inference.embedded").open_engine(
        config.model, num_slots=config.num_slots, context=config.context, seed=config.seed
    )
    return engine
