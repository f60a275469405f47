"""The vLLM engine against a server that speaks vLLM's protocol over a tiny model."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from katcore.errors import (
    ConfigError,
    ContextOverflowError,
    EngineBusyError,
    EngineError,
    EngineGoneError,
    RequestError,
)
from katcore.inference.bytes import write_byte_tokenizer
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import open_engine
from katcore.inference.vllm import Elsewhere, VllmEngine
from katcore.inference.vllm_http import Address
from katcore.plugin import Plugins
from katcore.protocols import SupportsClose, SupportsOpen, SupportsScore, SupportsTokens
from katcore.schema.call import Message, Sampling, ScoreRequest
from katcore.train.policy import load_policy
from tests.inference.fake_vllm import FakeVllm, problem
from tests.inference.tiny import CONTEXT, request, write_tiny_model


@pytest.fixture(scope="session")
def other_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, and weights that say something else."""
    folder = write_tiny_model(tmp_path_factory.mktemp("other"))
    model = load_policy(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    model.save_pretrained(folder)
    return folder


def prompts(num: int) -> list[tuple[int, ...]]:
    choose = random.Random(1)
    return [tuple(choose.choices(range(5, 260), k=choose.randint(1, 30))) for _ in range(num)]


def logprobs_of(
    folder: Path, prompt: tuple[int, ...], ids: tuple[int, ...], temperature: float
) -> list[float]:
    with torch.inference_mode():
        logits = load_policy(folder)(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    scaled = (logits / temperature).log_softmax(1)
    return [float(row[token]) for row, token in zip(scaled, ids, strict=True)]


async def test_greedy_answers_are_those_of_the_embedded_engine(
    engine: VllmEngine, model_folder: Path
) -> None:
    embedded = open_engine(model_folder, num_slots=1, context=CONTEXT)
    for ids in prompts(4):
        made = await engine.generate(request("s", ids))
        wanted = await embedded.generate(request("s", ids))
        assert replace(made, logprobs=()) == replace(wanted, logprobs=())
        assert made.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_are_those_of_the_temperature_it_drew_at(
    engine: VllmEngine, model_folder: Path, temperature: float
) -> None:
    for ids in prompts(3):
        made = await engine.generate(request("s", ids, temperature=temperature))
        wanted = logprobs_of(model_folder, ids, made.ids, temperature)
        assert made.logprobs == pytest.approx(wanted, abs=1e-4)


async def test_cuts_and_seeds_reach_the_server(engine: VllmEngine) -> None:
    (ids,) = prompts(1)
    asked = request("s", ids)
    narrow = replace(asked, sampling=Sampling(1.0, 12, top_k=1))
    assert set((await engine.generate(narrow)).logprobs) == {0.0}
    nucleus = replace(asked, sampling=Sampling(1.0, 12, top_p=1e-4))
    assert set((await engine.generate(nucleus)).logprobs) == {0.0}
    seeded = replace(asked, sampling=Sampling(1.0, 12, seed=5))
    again = [await engine.generate(seeded) for _ in range(2)]
    other = await engine.generate(replace(asked, sampling=Sampling(1.0, 12, seed=6)))
    assert again[0].ids == again[1].ids != other.ids


@pytest.mark.parametrize(("presence", "frequency"), [(1.0, 0.0), (0.0, 1.5), (-0.5, 0.5)])
async def test_penalties_count_in_log_probabilities(
    engine: VllmEngine, model_folder: Path, presence: float, frequency: float
) -> None:
    (ids,) = prompts(1)
    drawn = Sampling(0.0, 20, presence_penalty=presence, frequency_penalty=frequency)
    made = await engine.generate(replace(request("s", ids), sampling=drawn))
    with torch.inference_mode():
        logits = load_policy(model_folder)(torch.tensor([ids + made.ids])).logits[0].clone()
    for number, token in enumerate(made.ids):
        row = logits[len(ids) - 1 + number].tolist()
        for said in set(made.ids[:number]):
            row[said] -= presence + frequency * made.ids[:number].count(said)
        best = torch.tensor(row).log_softmax(0).max(0)
        assert (token, made.logprobs[number]) == (
            int(best.indices),
            pytest.approx(float(best.values), abs=1e-4),
        )


async def test_defaults_of_the_server_change_nothing(engine: VllmEngine, fake: FakeVllm) -> None:
    (ids,) = prompts(1)
    asked = replace(request("s", ids), sampling=Sampling(1.0, 12, seed=3))
    before = await engine.generate(asked)
    fake.defaults = {"temperature": 0.2, "top_k": 2, "top_p": 0.5, "repetition_penalty": 3.0}
    assert await engine.generate(asked) == before


async def test_an_answer_ends_with_its_end_token_or_at_its_limit(engine: VllmEngine) -> None:
    end_id = engine._chat.end_id
    asked = [request("s", ids, temperature=4.0, max_tokens=40) for ids in prompts(120)]
    made = await asyncio.gather(*map(engine.generate, asked))
    assert {item.finish for item in made} == {"stop", "length"}
    for item in made:
        assert (item.ids[-1] == end_id) == (item.finish == "stop")
        assert end_id not in item.ids[:-1]
        assert len(item.ids) == len(item.logprobs)
        assert "<|end|>" not in item.text


async def test_it_can_be_opened_closed_and_read(engine: VllmEngine) -> None:
    assert isinstance(engine, SupportsOpen)
    assert isinstance(engine, SupportsClose)
    assert isinstance(engine, SupportsTokens)
    await engine.open(lambda _: None)
    ids = engine.encode([Message("user", "ls")])
    assert (
        "".join(engine.token_texts(ids)[number] for number in ids)
        == "<|user|>ls<|end|><|assistant|>"
    )


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logits"])
async def test_other_log_probabilities_are_refused(
    engine: VllmEngine, fake: FakeVllm, mode: str
) -> None:
    fake.mode = mode
    for ask in (engine.open(lambda _: None), engine.generate(request("s", (9,)))):
        with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
            await ask


async def test_log_probabilities_of_a_sure_model_are_refused_too(
    engine: VllmEngine, fake: FakeVllm
) -> None:
    fake.mode = "raw_logprobs"
    with torch.no_grad():
        fake.model.model.norm.weight.mul_(20)
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        await engine.open(lambda _: None)


async def test_a_folder_of_another_model_is_refused(fake: FakeVllm, tmp_path: Path) -> None:
    async with fake.serving() as url:
        engine = VllmEngine(Elsewhere(url), ChatTokenizer(write_byte_tokenizer(tmp_path)))
        with pytest.raises(EngineError, match="another tokenizer than the model folder"):
            await engine.open(lambda _: None)
        await engine.close()


@pytest.mark.parametrize(
    ("model", "said"), [("", "several models; .*: one, two"), ("three", "no model 'three'")]
)
async def test_which_model_has_to_be_clear(
    engine: VllmEngine, fake: FakeVllm, model: str, said: str
) -> None:
    fake.names = ("one", "two")
    engine._model = model
    with pytest.raises(EngineError, match=said):
        await engine.open(lambda _: None)
    engine._model = "two"
    assert (await engine.generate(request("s", (9, 8)))).ids


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (problem(429, "slow down"), EngineBusyError),
        (problem(503, "full"), EngineBusyError),
        (problem(400, "This model's maximum context length is 9 tokens."), ContextOverflowError),
        (problem(400, "top_p must be in (0, 1], got 7."), RequestError),
        (problem(404, "The model `tiny` does not exist."), EngineError),
        (problem(500, "EngineCore encountered an issue"), EngineError),
        (web.Response(status=502, text="<html>Bad Gateway"), EngineError),
        (web.Response(text="<html>hello"), EngineError),
        (web.json_response({"choices": []}), EngineError),
    ],
)
async def test_a_refusal_says_whose_fault_it_is(
    engine: VllmEngine, fake: FakeVllm, trouble: web.Response, error: type[Exception]
) -> None:
    await engine.open(lambda _: None)
    trouble.headers["Retry-After"] = "3"
    fake.trouble = trouble
    with pytest.raises(error) as caught:
        await engine.generate(request("s", (9,)))
    assert type(caught.value) is error
    if isinstance(caught.value, EngineBusyError):
        assert caught.value.retry_after_s == 3.0


def _change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda answer: answer["choices"][0].update(changes)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_change(finish_reason="abort"), "broke an answer off after 12 ids: abort"),
        (_change(prompt_token_ids=[1, 2]), "another prompt"),
        (_change(token_ids=[7]), "1 ids and 12 log-probabilities"),
        (_change(token_ids=None), "0.11 or later"),
        (_change(logprobs={"token_logprobs": [None] * 12}), "not an answer"),
    ],
)
async def test_an_answer_that_is_not_whole_is_none(
    engine: VllmEngine, fake: FakeVllm, spoil: Any, said: str
) -> None:
    await engine.open(lambda _: None)
    fake.spoil = spoil
    with pytest.raises(EngineError, match=said):
        await engine.generate(request("s", (9,)))


@pytest.mark.parametrize("room", [-5, 0])
async def test_a_prompt_without_room_for_an_answer_is_refused(
    engine: VllmEngine, room: int
) -> None:
    with pytest.raises(ContextOverflowError, match=f"{CONTEXT - room} tokens > {CONTEXT - 1}"):
        await engine.generate(request("s", (9,) * (CONTEXT - room), max_tokens=50))


async def test_the_context_s_end_cuts_the_answer(engine: VllmEngine) -> None:
    made = await engine.generate(request("s", (9,) * (CONTEXT - 2), max_tokens=50))
    assert len(made.ids) <= 2
    engine._context, engine._served = 60, None
    with pytest.raises(ContextOverflowError, match="60 tokens > 59"):
        await engine.generate(request("s", (9,) * 60))


async def test_a_temperature_that_vllm_would_change_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(RequestError, match="greedy"):
        await engine.generate(request("s", (9,), temperature=0.001))


async def test_who_is_cancelled_ends_the_work_at_the_server(
    engine: VllmEngine, fake: FakeVllm
) -> None:
    await engine.open(lambda _: None)
    fake.delay_s = 0.05
    task = asyncio.create_task(engine.generate(request("s", (9,), max_tokens=80)))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(100):
        if fake.num_aborted:
            break
        await asyncio.sleep(0.02)
    assert fake.num_aborted == 1
    fake.delay_s = 0
    assert (await engine.generate(request("s", (9,)))).ids


async def test_a_key_is_asked_for_and_never_shown(model_folder: Path) -> None:
    fake = FakeVllm(model_folder, context=CONTEXT, key="right-one")
    chat = ChatTokenizer(model_folder)
    async with fake.serving() as url:
        engine = VllmEngine(Elsewhere(f"{url}/v1/", "right-one"), chat)
        assert (await engine.generate(request("s", (9,)))).ids
        assert "right-one" not in repr(engine._address)
        await engine.close()
        engine = VllmEngine(Elsewhere(url, "wrong-one"), chat)
        with pytest.raises(EngineError, match="refuses the key") as caught:
            await engine.open(lambda _: None)
        assert "wrong-one" not in str(caught.value)
        await engine.close()


async def test_new_weights_sign_what_follows(
    engine: VllmEngine, fake: FakeVllm, other_folder: Path
) -> None:
    (ids,) = prompts(1)
    first = await engine.generate(request("s", ids))
    fake.calls.clear()
    await engine.load_weights(other_folder, "step-7")
    assert fake.calls == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    second = await engine.generate(request("s", ids))
    assert (first.policy_version, second.policy_version) == ("0", "step-7")
    embedded = open_engine(other_folder, num_slots=1, context=CONTEXT)
    assert second.ids == (await embedded.generate(request("s", ids))).ids != first.ids


async def test_an_answer_has_one_version_of_the_weights(
    engine: VllmEngine, fake: FakeVllm, model_folder: Path, other_folder: Path
) -> None:
    (ids,) = prompts(1)
    await engine.open(lambda _: None)
    fake.delay_s = 0.02
    running = asyncio.create_task(engine.generate(request("s", ids)))
    await asyncio.sleep(0.05)
    loading = asyncio.create_task(engine.load_weights(other_folder, "new"))
    await asyncio.sleep(0)
    later = asyncio.create_task(engine.generate(request("t", ids)))
    old, _, new = await asyncio.gather(running, loading, later)
    for made, folder, version in ((old, model_folder, "0"), (new, other_folder, "new")):
        assert made.policy_version == version
        wanted = logprobs_of(folder, ids, made.ids, 1.0)
        assert made.logprobs == pytest.approx(wanted, abs=1e-4)


async def test_nothing_is_answered_by_weights_that_may_be_half_there(
    engine: VllmEngine, other_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="Cannot find any model weights"):
        await engine.load_weights(tmp_path, "1")
    with pytest.raises(EngineError, match="did not take the weights"):
        await engine.generate(request("s", (9,)))
    await engine.load_weights(other_folder, "2")
    assert (await engine.generate(request("s", (9,)))).policy_version == "2"


async def test_a_server_without_its_endpoints_takes_no_weights(
    model_folder: Path, other_folder: Path
) -> None:
    fake = FakeVllm(model_folder, context=CONTEXT, takes_weights=False)
    async with fake.serving() as url:
        engine = VllmEngine(Elsewhere(url), ChatTokenizer(model_folder))
        with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
            await engine.load_weights(other_folder, "1")
        await engine.close()


class Restarted:
    """A server that is another one, of the first weights, after each doubt."""

    def __init__(self, *urls: str) -> None:
        self.urls = list(urls)
        self.start = 1

    async def ready(self, report: Callable[[str], None]) -> Address:
        return Address(self.urls[0], "", self.start)

    def doubt(self, address: Address) -> str:
        assert address.start == self.start
        del self.urls[0]
        self.start += 1
        return "CUDA error"

    async def close(self) -> None:
        pass


async def test_a_server_that_died_is_asked_again_when_it_is_back_with_its_weights(
    model_folder: Path, other_folder: Path
) -> None:
    first, second = (FakeVllm(model_folder, context=CONTEXT) for _ in range(2))
    async with second.serving() as then:
        async with first.serving() as now:
            engine = VllmEngine(Restarted(now, then), ChatTokenizer(model_folder))
            await engine.load_weights(other_folder, "3")
            first.delay_s = 0.2
            lost = asyncio.create_task(engine.generate(request("s", (9,))))
            await asyncio.sleep(0.1)
        with pytest.raises(EngineGoneError, match=r"does not answer(.|\n)*CUDA error"):
            await lost
        made = await engine.generate(request("s", (9,)))
        assert made.policy_version == "3"
        assert "/collective_rpc" in second.calls
        wanted = open_engine(other_folder, num_slots=1, context=CONTEXT)
        assert made.ids == (await wanted.generate(request("s", (9,)))).ids
        await engine.close()


async def test_weights_that_a_server_died_over_can_be_put_into_the_next(
    model_folder: Path, other_folder: Path
) -> None:
    first, second = (FakeVllm(model_folder, context=CONTEXT) for _ in range(2))
    async with second.serving() as then:
        async with first.serving() as now:
            engine = VllmEngine(Restarted(now, then), ChatTokenizer(model_folder))
            await engine.open(lambda _: None)
        with pytest.raises(EngineGoneError, match="CUDA error"):
            await engine.load_weights(other_folder, "1")
        with pytest.raises(EngineError, match="did not take the weights"):
            await engine.generate(request("s", (9,)))
        await engine.load_weights(other_folder, "1")
        made = await engine.generate(request("s", (9,)))
        wanted = open_engine(other_folder, num_slots=1, context=CONTEXT)
        assert made.ids == (await wanted.generate(request("s", (9,)))).ids
        await engine.close()


async def test_a_server_elsewhere_that_was_away_proves_itself_again(model_folder: Path) -> None:
    fake = FakeVllm(model_folder, context=CONTEXT)
    chat = ChatTokenizer(model_folder)
    async with fake.serving() as url:
        engine = VllmEngine(Elsewhere(url), chat)
        await engine.open(lambda _: None)
    with pytest.raises(EngineGoneError, match="does not answer"):
        await engine.generate(request("s", (9,)))
    fake.mode = "raw_logprobs"
    async with fake.serving(int(url.rpartition(":")[2])):
        with pytest.raises(EngineError, match="--logprobs-mode"):
            await engine.generate(request("s", (9,)))
    await engine.close()


async def test_it_is_found_by_its_name(
    fake: FakeVllm, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.key = "k-1"
    monkeypatch.setenv("SOME_KEY", "k-1")
    async with fake.serving() as url:
        options = {"model": model_folder, "url": url, "key": "SOME_KEY", "context": 50}
        engine = Plugins.installed().make("engine", "vllm", options)
        with pytest.raises(ContextOverflowError, match="> 49 maximum"):
            await engine.generate(request("s", (9,) * 50))
        await engine.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"url": "http://127.0.0.1:1", "python": "/usr/bin/python3"},
            "python means nothing with url",
        ),
        ({"served": "x"}, "served means nothing without url"),
        ({"arguments": ["--host=0.0.0.0"]}, "--host is chosen by katcore"),
        ({"python": "/no/such/python"}, "cannot be run"),
        ({"url": "http://127.0.0.1:1", "key": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    model_folder: Path, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(ConfigError, match=said):
        Plugins.installed().make("engine", "vllm", {"model": model_folder, **options})


def test_without_vllm_it_says_where_to_get_it(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'katcore\[serve\]'"):
        Plugins.installed().make("engine", "vllm", {"model": model_folder})


async def test_scores_are_the_model_s_log_probabilities(
    engine: VllmEngine, model_folder: Path
) -> None:
    assert isinstance(engine, SupportsScore)
    prompt, answer = prompts(2)
    ids, places = prompt + answer, tuple(range(len(prompt), len(prompt) + len(answer)))
    found = await engine.score(ScoreRequest(ids, places, Sampling()))
    assert found == pytest.approx(logprobs_of(model_folder, prompt, answer, 1.0), abs=1e-4)
    assert await engine.score(ScoreRequest(ids, places[-1:], Sampling())) == found[-1:]


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(top_p=0.9), Sampling(0.0)])
async def test_scores_at_another_temperature_are_refused(
    engine: VllmEngine, sampling: Sampling
) -> None:
    with pytest.raises(RequestError, match=r"temperature 1 without cuts.*place: trainer"):
        await engine.score(ScoreRequest((9, 8), (1,), sampling))


async def test_what_fills_the_context_is_not_scored(engine: VllmEngine) -> None:
    with pytest.raises(ContextOverflowError, match=f"{CONTEXT} ids > {CONTEXT - 1} maximum"):
        await engine.score(ScoreRequest((9,) * CONTEXT, (1,), Sampling()))
    assert await engine.score(ScoreRequest((9,) * (CONTEXT - 1), (1,), Sampling()))


@pytest.mark.parametrize("shown", [None, [None], [None, {"7": {"logprob": -1.0}}]])
async def test_scores_of_other_ids_are_refused(
    engine: VllmEngine, fake: FakeVllm, shown: object
) -> None:
    fake.spoil = lambda answer: answer["choices"][0].update(prompt_logprobs=shown)
    with pytest.raises(EngineError, match=r"no log-probabilities|scored 1 ids of 2"):
        await engine.score(ScoreRequest((9, 8), (1,), Sampling()))
