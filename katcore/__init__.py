"""katcore: specialize expert agents, then unify them into one model."""

__version__ = "0.1.0"
