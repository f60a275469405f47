from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from katcore.inference.chat import ChatTokenizer
from katcore.inference.vllm import Elsewhere, VllmEngine
from tests.inference.fake_vllm import FakeVllm
from tests.inference.tiny import CONTEXT, write_tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def fake(model_folder: Path) -> FakeVllm:
    return FakeVllm(model_folder, context=CONTEXT)


@pytest.fixture
async def engine(fake: FakeVllm, model_folder: Path) -> AsyncIterator[VllmEngine]:
    async with fake.serving() as url:
        made = VllmEngine(Elsewhere(url), ChatTokenizer(model_folder))
        yield made
        await made.close()
