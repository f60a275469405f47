"""Where MLflow keeps its data under katcore's home; imports no mlflow, so that anyone may ask."""

from pathlib import Path


def tracking_uri(root: Path) -> str:
    """The URI of the store under a home folder."""
    return f"sqlite:///{root / 'mlflow.db'}"


def artefact_root(root: Path) -> Path:
    """Where the artefacts of new experiments go."""
    return root / "mlartifacts"
