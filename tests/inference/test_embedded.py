"""The embedded engine samples from the very distribution that training computes."""

import asyncio
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from katcore.errors import ContextOverflowError, EngineError, RequestError
from katcore.inference.embedded import EmbeddedEngine, open_engine
from katcore.protocols import SupportsScore
from katcore.schema.call import Generation, Sampling, ScoreRequest
from katcore.train.policy import load_policy, logits_at
from tests.inference.tiny import CONTEXT, request


@pytest.fixture
def engine(model_folder: Path) -> EmbeddedEngine:
    return open_engine(model_folder, num_slots=4, context=CONTEXT)


def prompts(num: int, seed: int = 0) -> list[tuple[int, ...]]:
    choose = random.Random(seed)
    return [tuple(choose.choices(range(5, 260), k=choose.randint(1, 30))) for _ in range(num)]


def training_logprobs(
    folder: Path, prompt: tuple[int, ...], answer: tuple[int, ...], temperature: float
) -> torch.Tensor:
    """What the training pass gives the answer's ids, over the whole sequence at once."""
    ids = torch.tensor([prompt + answer])
    length = ids.shape[1]
    at = torch.arange(len(prompt) - 1, length - 1)
    mask = torch.ones(1, length, length, dtype=torch.bool).tril()
    with torch.inference_mode():
        logits = logits_at(load_policy(folder), ids, torch.arange(length)[None], mask, at)
    scaled = (logits / (temperature or 1.0)).log_softmax(1)
    return scaled.gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
async def test_logprobs_are_those_of_the_training_pass(
    engine: EmbeddedEngine, model_folder: Path, temperature: float
) -> None:
    async def converse(session: str, prompt: tuple[int, ...]) -> None:
        for more in ((), (7, 8, 9), (11,)):
            prompt += more
            made = await engine.generate(request(session, prompt, temperature=temperature))
            wanted = training_logprobs(model_folder, prompt, made.ids, temperature)
            torch.testing.assert_close(torch.tensor(made.logprobs), wanted, rtol=1e-5, atol=2e-5)
            prompt += made.ids

    await asyncio.gather(*(converse(f"s{n}", ids) for n, ids in enumerate(prompts(9))))


async def test_greedy_is_the_likeliest_token_each_time(
    engine: EmbeddedEngine, model_folder: Path
) -> None:
    (prompt,) = prompts(1)
    made = await engine.generate(request("s", prompt))
    policy = load_policy(model_folder)
    ids = list(prompt)
    for token in made.ids:
        with torch.inference_mode():
            assert int(policy(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


async def test_many_at_once_equal_one_by_one(model_folder: Path) -> None:
    wanted = [request(f"s{n}", ids, max_tokens=3 + n % 9) for n, ids in enumerate(prompts(14))]
    together = open_engine(model_folder, num_slots=5, context=CONTEXT)
    alone = open_engine(model_folder, num_slots=1, context=CONTEXT)
    at_once = await asyncio.gather(*map(together.generate, wanted))
    one_by_one = [await alone.generate(item) for item in wanted]
    assert [made.ids for made in at_once] == [made.ids for made in one_by_one]
    for many, one in zip(at_once, one_by_one, strict=True):
        assert many.logprobs == pytest.approx(one.logprobs, abs=2e-5)


class Watched:
    """How many ids each forward pass takes in."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.widths: list[int] = []
        forward = engine._forward

        def watched(slots: object, ids_BQ: torch.Tensor, *rest: object) -> torch.Tensor:  # noqa: N803
            self.widths.append(ids_BQ.shape[1])
            return forward(slots, ids_BQ, *rest)  # type: ignore[arg-type]

        engine._forward = watched  # type: ignore[method-assign,assignment]


async def test_a_turn_costs_only_its_new_tokens(engine: EmbeddedEngine) -> None:
    prompt = prompts(1)[0] + (5,) * 20
    first = await engine.generate(request("s", prompt))
    watched = Watched(engine)
    longer = (*prompt, *first.ids, 7, 8, 9)
    await engine.generate(request("s", longer))
    assert watched.widths[0] == 4, "the last sampled id and three new ones"
    assert set(watched.widths[1:]) == {1}


async def test_what_is_kept_changes_no_answer(model_folder: Path, engine: EmbeddedEngine) -> None:
    for number, prompt in enumerate(prompts(8)):
        first = await engine.generate(request(f"s{number % 3}", prompt))
        longer = (*prompt, *first.ids, 9)
        kept = await engine.generate(request(f"s{number % 3}", longer))
        fresh = open_engine(model_folder, num_slots=1, context=CONTEXT)
        assert kept.ids == (await fresh.generate(request("x", longer))).ids


async def test_one_session_may_ask_twice_at_once(engine: EmbeddedEngine) -> None:
    one, two = prompts(2)
    apart = [await engine.generate(request("x", one)), await engine.generate(request("y", two))]
    together = await asyncio.gather(
        engine.generate(request("s", one)), engine.generate(request("s", two))
    )
    assert [made.ids for made in together] == [made.ids for made in apart]


async def test_new_weights_forget_what_was_kept(engine: EmbeddedEngine) -> None:
    (prompt,) = prompts(1, seed=5)
    first = await engine.generate(request("s", prompt))
    engine.weights_changed("step-7")
    with torch.no_grad():
        engine._model.model.norm.weight.mul_(-1)
    watched = Watched(engine)
    second = await engine.generate(request("s", prompt))
    assert watched.widths[0] == len(prompt)
    assert (first.policy_version, second.policy_version) == ("0", "step-7")
    assert first.ids != second.ids


async def test_samples_follow_the_distribution(engine: EmbeddedEngine, model_folder: Path) -> None:
    (prompt,) = prompts(1)
    draws = await asyncio.gather(
        *(
            engine.generate(request(f"s{n}", prompt, temperature=0.5, max_tokens=1))
            for n in range(400)
        )
    )
    every = tuple(range(engine._chat.vocabulary))
    logprobs = torch.stack(
        [training_logprobs(model_folder, prompt, (token,), 0.5)[0] for token in every[::1]]
    )
    mean = (logprobs.exp() * logprobs).sum()
    deviation = ((logprobs.exp() * logprobs**2).sum() - mean**2).sqrt() / 400**0.5
    seen = sum(made.logprobs[0] for made in draws) / 400
    assert abs(seen - float(mean)) < 4 * float(deviation)
    assert len({made.ids for made in draws}) > 3


async def test_a_seed_gives_the_same_again(model_folder: Path) -> None:
    async def draw(seed: int) -> tuple[int, ...]:
        engine = open_engine(model_folder, num_slots=1, context=CONTEXT, seed=seed)
        return (await engine.generate(request("s", prompts(1)[0], temperature=1.0))).ids

    assert await draw(1) == await draw(1) != await draw(2)


def is_whole(made: Generation, end_id: int) -> bool:
    has_end = made.ids[-1:] == (end_id,)
    return has_end == (made.finish == "stop") and end_id not in made.ids[:-1]


async def test_an_answer_stops_at_its_end_or_its_limit(engine: EmbeddedEngine) -> None:
    wanted = [
        request(f"s{n}", ids, temperature=4.0, max_tokens=40) for n, ids in enumerate(prompts(40))
    ]
    made = await asyncio.gather(*map(engine.generate, wanted))
    assert {item.finish for item in made} == {"stop", "length"}
    assert all(is_whole(item, engine._chat.end_id) for item in made)
    assert all(len(item.ids) == 40 for item in made if item.finish == "length")
    assert all("<|end|>" not in item.text for item in made)
    assert all(len(item.ids) == len(item.logprobs) for item in made)


@pytest.mark.parametrize("room", [1, 4])
async def test_the_context_s_end_cuts_the_answer(engine: EmbeddedEngine, room: int) -> None:
    made = await engine.generate(request("s", (9,) * (CONTEXT - room), max_tokens=50))
    assert len(made.ids) <= room
    if engine._chat.end_id not in made.ids:
        assert (len(made.ids), made.finish) == (room, "length")


@pytest.mark.parametrize("room", [-5, 0])
async def test_a_prompt_without_room_for_an_answer_is_refused(
    engine: EmbeddedEngine, room: int
) -> None:
    with pytest.raises(ContextOverflowError, match=f"{CONTEXT - room} tokens > {CONTEXT - 1}"):
        await engine.generate(request("s", (9,) * (CONTEXT - room), max_tokens=50))


async def test_penalties_are_refused(engine: EmbeddedEngine) -> None:
    (ids,) = prompts(1)
    asked = replace(request("s", ids), sampling=Sampling(presence_penalty=0.5))
    with pytest.raises(RequestError, match="penalty"):
        await engine.generate(asked)


async def test_a_seed_gives_the_same_answer_again_among_others(engine: EmbeddedEngine) -> None:
    (ids,) = prompts(1)
    asked = replace(request("s", ids), sampling=Sampling(1.0, 20, seed=5))
    alone = await engine.generate(asked)
    others = [engine.generate(request(f"o{n}", ids)) for n in range(3)]
    again, *_ = await asyncio.gather(engine.generate(replace(asked, session_id="t")), *others)
    assert again.ids == alone.ids


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (4, 0.6)])
async def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(
    engine: EmbeddedEngine, top_k: int, top_p: float
) -> None:
    (ids,) = prompts(1)
    sampling = Sampling(1.0, 1, top_p=top_p, top_k=top_k)
    asked = [replace(request(f"s{n}", ids), sampling=sampling) for n in range(200)]
    made = await asyncio.gather(*map(engine.generate, asked))
    seen = {item.ids[0]: item.logprobs[0] for item in made}
    with torch.inference_mode():
        logits = engine._model(torch.tensor([ids])).logits[0, -1].double()
    kept = dict(_kept(logits.log_softmax(0), top_k or len(logits), top_p))
    assert set(seen) <= set(kept)
    for token, logprob in seen.items():
        assert logprob == pytest.approx(kept[token], abs=1e-4)


def _kept(logprobs: torch.Tensor, top_k: int, top_p: float) -> list[tuple[int, float]]:
    """What is left after top-k and then top-p, one token at a time."""
    shares: list[float] = logprobs.exp().tolist()
    ordered = sorted(enumerate(shares), key=lambda item: -item[1])[:top_k]
    total = sum(share for _, share in ordered)
    kept, before = [], 0.0
    for token, share in ordered:
        if before < top_p * total:
            kept.append((token, share))
        before += share
    whole = sum(share for _, share in kept)
    return [(token, math.log(share / whole)) for token, share in kept]


async def test_cancelled_requests_leave_room(engine: EmbeddedEngine) -> None:
    tasks = [
        asyncio.create_task(engine.generate(request(f"s{n}", ids, max_tokens=60)))
        for n, ids in enumerate(prompts(12))
    ]
    await asyncio.sleep(0.02)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(item, Generation) for item in results[1::2])
    assert all(isinstance(item, asyncio.CancelledError) for item in results[::2])
    (prompt,) = prompts(1)
    again = await engine.generate(request("new", prompt))
    assert again.ids
    assert not any(slot.is_busy for slot in engine._slots)
    assert not engine._waiting


async def test_a_failure_is_told_to_everyone_and_passes(engine: EmbeddedEngine) -> None:
    model = engine._model
    engine._model = None
    wanted = [request(f"s{n}", ids) for n, ids in enumerate(prompts(9))]
    results = await asyncio.gather(*map(engine.generate, wanted), return_exceptions=True)
    assert [type(item) for item in results] == [EngineError] * 9
    engine._model = model
    assert (await engine.generate(wanted[0])).ids


async def test_a_long_prompt_goes_in_parts_to_the_same_answers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [request(f"s{n}", ids) for n, ids in enumerate(prompts(6))]
    whole = open_engine(model_folder, num_slots=3, context=CONTEXT)
    expected = await asyncio.gather(*map(whole.generate, wanted))
    for elements in (1, 40, 300):
        monkeypatch.setattr("katcore.inference.embedded._MAX_MASK", elements)
        parts = open_engine(model_folder, num_slots=3, context=CONTEXT)
        found = await asyncio.gather(*map(parts.generate, wanted))
        assert [item.ids for item in found] == [item.ids for item in expected]
        for item, other in zip(found, expected, strict=True):
            assert item.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
async def test_scores_are_those_of_the_training_pass(
    engine: EmbeddedEngine, model_folder: Path, temperature: float
) -> None:
    async def check(prompt: tuple[int, ...], answer: tuple[int, ...]) -> None:
        ids, places = prompt + answer, range(len(prompt), len(prompt) + len(answer))
        found = await engine.score(ScoreRequest(ids, tuple(places), Sampling(temperature)))
        wanted = training_logprobs(model_folder, prompt, answer, temperature)
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-5, atol=2e-5)
        (last,) = await engine.score(ScoreRequest(ids, (len(ids) - 1,), Sampling(temperature)))
        assert last == pytest.approx(found[-1], abs=2e-5)

    assert isinstance(engine, SupportsScore)
    await asyncio.gather(*map(check, prompts(9), prompts(9, seed=4)))


async def test_an_answer_s_scores_are_its_logprobs(engine: EmbeddedEngine) -> None:
    """Also while others are being answered."""
    asked = [request(f"s{n}", ids, temperature=0.8) for n, ids in enumerate(prompts(6))]
    made = await asyncio.gather(*map(engine.generate, asked))

    async def check(number: int) -> None:
        prompt, answer = asked[number].prompt_ids, made[number]
        places = tuple(range(len(prompt), len(prompt) + len(answer.ids)))
        found = await engine.score(ScoreRequest(prompt + answer.ids, places, Sampling(0.8)))
        assert found == pytest.approx(answer.logprobs, abs=2e-5)

    busy = [engine.generate(request(f"t{n}", ids)) for n, ids in enumerate(prompts(3))]
    await asyncio.gather(*map(check, range(6)), *busy)


async def test_scores_share_batches_in_the_order_in_which_they_came(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    forward = engine._model.model.forward

    def watched(**given: torch.Tensor) -> object:
        seen.append(given["input_ids"][:, 0].tolist())
        return forward(**given)

    monkeypatch.setattr(engine._model.model, "forward", watched)
    wanted = [ScoreRequest((n, 7, 8), (2,), Sampling()) for n in range(10, 20)]
    await asyncio.gather(*map(engine.score, wanted))
    assert seen == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]
    monkeypatch.setattr("katcore.inference.prefill._MAX_TOKENS", 6)
    await asyncio.gather(*map(engine.score, wanted[:3]))
    assert seen[3:] == [[10, 11], [12]]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (ScoreRequest((9,) * (CONTEXT + 1), (1,), Sampling()), f"{CONTEXT + 1} ids > {CONTEXT}"),
        (ScoreRequest((9, 9), (0,), Sampling()), "not in 1 .. 1"),
        (ScoreRequest((9, 9), (2,), Sampling()), "not in 1 .. 1"),
        (ScoreRequest((9, 9), (), Sampling()), "not in 1 .. 1"),
        (ScoreRequest((9, 9), (1,), Sampling(top_k=3)), "without cuts and penalties"),
    ],
)
async def test_what_cannot_be_scored_is_refused(
    engine: EmbeddedEngine, asked: ScoreRequest, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        await engine.score(asked)


async def test_a_failure_is_told_to_all_who_want_scores(engine: EmbeddedEngine) -> None:
    model = engine._prefills._model
    engine._prefills._model = None
    wanted = [ScoreRequest((9, 8, n), (2,), Sampling()) for n in range(9)]
    results = await asyncio.gather(*map(engine.score, wanted), return_exceptions=True)
    assert [type(item) for item in results] == [EngineError] * 9
    engine._prefills._model = model
    assert await engine.score(wanted[0])
