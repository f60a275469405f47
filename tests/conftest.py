"""Property tests have no deadline: how long an example takes says nothing on a shared machine."""

import os

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What starts vLLM has to be asked for: it needs an environment of its own."""
    if os.environ.get("KATCORE_VLLM_PYTHON"):
        return
    unasked = [item for item in items if item.get_closest_marker("vllm")]
    config.hook.pytest_deselected(items=unasked)
    items[:] = [item for item in items if item not in unasked]
