"""A real vLLM server, where `KATCORE_VLLM_PYTHON` names an interpreter that has vLLM; minutes on a CPU.

See docs/how-to/serve-with-vllm.md. Elsewhere these tests are not chosen, which pytest counts as deselected.
"""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import openai
import psutil
import pytest
import pytest_asyncio
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from katcore.errors import ContextOverflowError, EngineError, EngineGoneError
from katcore.inference.bytes import write_byte_tokenizer
from katcore.inference.chat import ChatTokenizer
from katcore.inference.vllm import VllmEngine
from katcore.inference.vllm_server import Start, VllmServer, find_python
from katcore.proxy.server import Proxy
from katcore.proxy.session import SessionSpec
from katcore.schema.call import EngineRequest, Message, Sampling, ScoreRequest, Tool, ToolCall

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.asyncio(loop_scope="module"),
]
CONTEXT = 2048
BASH = Tool(
    "bash", "Runs a command.", '{"type": "object", "properties": {"command": {"type": "string"}}}'
)
QUESTION = Message("user", "What is here?")
CALL = Message("assistant", "", tool_calls=(ToolCall("", "bash", '{"command": "ls"}'),))


def write_qwen3(folder: Path, *, seed: int) -> Path:
    """A random Qwen3 of some hundred thousand parameters that knows bytes."""
    chat = ChatTokenizer(write_byte_tokenizer(folder))
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=chat.vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=chat.end_id,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def teach_call(folder: Path) -> Path:
    """Make it answer the question with the call, by heart."""
    chat = ChatTokenizer(folder)
    prompt, answer = chat.encode([QUESTION], tools=[BASH]), chat.answer_ids(CALL, [BASH])
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([prompt + answer])
    for _ in range(300):
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        loss = cross_entropy(logits, torch.tensor(answer))
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    return teach_call(write_qwen3(first, seed=0)), write_qwen3(second, seed=1)


@pytest.fixture(scope="module")
def start(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Start:
    os.environ["KATCORE_HOME"] = str(tmp_path_factory.mktemp("home"))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    python = find_python(Path(os.environ["KATCORE_VLLM_PYTHON"]))
    arguments = ("--dtype", "float32", "--max-model-len", str(CONTEXT))
    return Start(folders[0], python, arguments, takes_weights=True, timeout_s=900)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(start: Start) -> AsyncIterator[VllmServer]:
    made = VllmServer(start)
    yield made
    assert made._process is not None
    processes = psutil.Process(made._process.pid).children(recursive=True)
    assert processes
    await made.close()
    alive = [item for item in processes if item.is_running()]
    assert all(item.status() == psutil.STATUS_ZOMBIE for item in alive)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(server: VllmServer, start: Start) -> AsyncIterator[VllmEngine]:
    made = VllmEngine(server, ChatTokenizer(start.model))
    said: list[str] = []
    await made.open(said.append)
    assert "its log is" in said[0]
    yield made
    assert made._client is not None
    await made._client.close()


def asked(ids: tuple[int, ...], **sampling: object) -> EngineRequest:
    given = {"temperature": 1.0, "max_tokens": 24} | sampling
    return EngineRequest("s", ids, Sampling(**given))  # type: ignore[arg-type]


def logits_of(folder: Path, prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]  # type: ignore[no-any-return]


def logprobs_of(
    folder: Path, prompt: tuple[int, ...], ids: tuple[int, ...], temperature: float
) -> list[float]:
    scaled = (logits_of(folder, prompt, ids) / temperature).log_softmax(1)
    return [float(row[token]) for row, token in zip(scaled, ids, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
async def test_log_probabilities_are_those_of_transformers(
    engine: VllmEngine, folders: tuple[Path, Path], temperature: float
) -> None:
    prompts = [engine.encode([Message("user", text)]) for text in ("one", "zwei", "数字 3")]
    made = await asyncio.gather(
        *(engine.generate(asked(ids, temperature=temperature)) for ids in prompts)
    )
    for ids, item in zip(prompts, made, strict=True):
        wanted = logprobs_of(folders[0], ids, item.ids, temperature or 1.0)
        assert item.logprobs == pytest.approx(wanted, abs=2e-3)
        if not temperature:
            best = logits_of(folders[0], ids, item.ids).argmax(1).tolist()
            assert list(item.ids) == best


async def test_scores_are_the_log_probabilities_of_transformers(
    engine: VllmEngine, folders: tuple[Path, Path]
) -> None:
    """Also when the server has seen the same ids before."""
    ids = engine.encode([Message("user", "one")])
    made = await engine.generate(asked(ids))
    places = tuple(range(len(ids), len(ids) + len(made.ids)))
    wanted = logprobs_of(folders[0], ids, made.ids, 1.0)
    for _ in range(2):
        found = await engine.score(ScoreRequest(ids + made.ids, places, Sampling()))
        assert found == pytest.approx(wanted, abs=2e-3)


async def test_greedy_among_others_carries_the_same(engine: VllmEngine) -> None:
    ids = engine.encode([Message("user", "one")])
    alone = await engine.generate(asked(ids, temperature=0.0))
    warm = [engine.generate(asked(ids, temperature=0.5, top_k=5, top_p=0.5)) for _ in range(6)]
    among, *_ = await asyncio.gather(engine.generate(asked(ids, temperature=0.0)), *warm)
    assert among.ids == alone.ids
    assert among.logprobs == pytest.approx(alone.logprobs, abs=2e-3)


async def test_cuts_seeds_and_penalties_are_understood(
    engine: VllmEngine, folders: tuple[Path, Path]
) -> None:
    ids = engine.encode([Message("user", "one")])
    for cut in ({"top_k": 1}, {"top_p": 1e-4}):
        assert set((await engine.generate(asked(ids, **cut))).logprobs) == {0.0}
    one, same = [await engine.generate(asked(ids, seed=5)) for _ in range(2)]
    assert one.ids == same.ids
    varied = await engine.generate(asked(ids, temperature=0.0, presence_penalty=2.0))
    logits = logits_of(folders[0], ids, varied.ids).clone()
    for number, row in enumerate(logits):
        row[list(set(varied.ids[:number]))] -= 2.0
    wanted = logits.log_softmax(1).max(1)
    assert list(varied.ids) == wanted.indices.tolist()
    assert varied.logprobs == pytest.approx(wanted.values.tolist(), abs=2e-3)


async def test_the_context_is_the_server_s(engine: VllmEngine) -> None:
    with pytest.raises(ContextOverflowError, match=f"{CONTEXT} tokens > {CONTEXT - 1} maximum"):
        await engine.generate(asked((9,) * CONTEXT))
    made = await engine.generate(asked((9,) * (CONTEXT - 2)))
    assert len(made.ids) <= 2


async def test_who_is_cancelled_leaves_the_server_well(engine: VllmEngine) -> None:
    ids = engine.encode([Message("user", "one")])
    tasks = [
        asyncio.create_task(engine.generate(asked(ids, max_tokens=1500, temperature=2.0)))
        for _ in range(4)
    ]
    await asyncio.sleep(0.3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (await engine.generate(asked(ids))).ids


async def test_a_tool_call_comes_through_the_proxy(engine: VllmEngine, tmp_path: Path) -> None:
    async with Proxy(tmp_path / "calls.jsonl") as proxy:
        session, endpoint = proxy.open(SessionSpec("s", engine, Sampling(0.0, 200), model="m"))
        client = openai.AsyncOpenAI(
            base_url=f"{endpoint.base_url}/v1", api_key=endpoint.api_key, max_retries=0
        )
        function = {
            "name": BASH.name,
            "description": BASH.description,
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
        }
        answer = await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": QUESTION.content}],
            tools=[{"type": "function", "function": function}],  # type: ignore[list-item]
        )
        await client.close()
        (call,) = answer.choices[0].message.tool_calls or ()
        assert (call.function.name, call.function.arguments) == ("bash", '{"command": "ls"}')  # type: ignore[union-attr]
        (kept,) = session.calls
    assert kept.generation.ids == engine._chat.answer_ids(CALL, [BASH])
    assert kept.generation.origin == "sampled"
    assert min(kept.generation.logprobs) > -1.0


async def test_new_weights_are_put_in_and_survive_the_server(
    engine: VllmEngine, server: VllmServer, folders: tuple[Path, Path]
) -> None:
    ids = engine.encode([Message("user", "one")])
    before = await engine.generate(asked(ids, temperature=0.0))
    await engine.load_weights(folders[1], "7")
    after = await engine.generate(asked(ids, temperature=0.0))
    assert (before.policy_version, after.policy_version) == ("0", "7")
    assert after.logprobs == pytest.approx(logprobs_of(folders[1], ids, after.ids, 1.0), abs=2e-3)
    assert before.ids != after.ids
    assert server._process is not None
    (api_server,) = psutil.Process(server._process.pid).children()
    api_server.kill()
    with pytest.raises(EngineGoneError, match="does not answer"):
        await engine.generate(asked(ids))
    again = await engine.generate(asked(ids, temperature=0.0))
    assert again.policy_version == "7"
    assert again.ids == after.ids


async def test_a_server_as_it_comes_is_refused(start: Start) -> None:
    arguments = (*start.arguments, "--logprobs-mode", "raw_logprobs")
    server = VllmServer(replace(start, arguments=arguments))
    engine = VllmEngine(server, ChatTokenizer(start.model))
    try:
        with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
            await engine.open(lambda _: None)
    finally:
        await engine.close()


def write_adapter(folder: Path, model: Path) -> Path:
    """A random adapter of rank 4 in the form of `peft`, and in `merged/` the model with it added in."""
    random = torch.Generator().manual_seed(5)
    whole = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    name, weights = "model.layers.0.self_attn.q_proj", {}
    layer = whole.get_submodule(name)
    down = torch.randn((4, layer.in_features), generator=random)
    up = torch.randn((layer.out_features, 4), generator=random)
    weights[f"base_model.model.{name}.lora_A.weight"] = down
    weights[f"base_model.model.{name}.lora_B.weight"] = up
    with torch.no_grad():
        layer.weight += 2.0 * (up @ down)
    shutil.copytree(model, folder / "merged")
    whole.save_pretrained(folder / "merged")
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return folder


async def test_an_adapter_is_swapped_in(start: Start, tmp_path: Path) -> None:
    server = VllmServer(replace(start, takes_weights=False, adapter_rank=4))
    engine = VllmEngine(server, ChatTokenizer(start.model))
    try:
        ids = engine.encode([Message("user", "one")])
        before = await engine.generate(asked(ids, temperature=0.0))
        adapter = write_adapter(tmp_path, start.model)
        await engine.load_weights(adapter, "7")
        after = await engine.generate(asked(ids, temperature=0.0))
        assert (before.policy_version, after.policy_version) == ("0", "7")
        wanted = logprobs_of(adapter / "merged", ids, after.ids, 1.0)
        assert after.logprobs == pytest.approx(wanted, abs=2e-3)
        assert before.ids != after.ids
    finally:
        await engine.close()
