"""What a vLLM server has to prove before anything it samples is trained on.

That it serves the model; that its tokenizer is the folder's; and that its log-probabilities are those of the
distribution it drew from, after temperature and cuts. vLLM's default are the model's own, which at any other
temperature than 1 are those of another policy than the one that acted.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from katcore.errors import EngineError, EngineGoneError, RequestError
from katcore.inference.chat import ChatTokenizer
from katcore.inference.vllm_http import VllmClient

_TEXT = 'déjà vu:\n\t{"n": [12, 345]} → 🙂'
"""What tokenizers differ in: accents, digits, white space, an emoji."""
_COLD, _KEPT, _SHOWN = 0.25, 4, 8
_NEVER = -9000.0
"""vLLM writes minus infinity as -9999."""
_WHOLE = 0.02
"""How far a sum of probabilities may be from 1."""
_CLEAR = 0.05
"""Differences of log-probabilities from here on are no rounding."""

NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Said with each request: what is left out, a server takes from the model's `generation_config.json`."""


@dataclass(frozen=True, slots=True)
class Served:
    """The model of a server: its name there, its length in tokens, what it computes in ("": not known)."""

    name: str
    context: int
    precision: str = ""


async def probe(client: VllmClient, chat: ChatTokenizer, model: str, context: int | None) -> Served:
    """The model that is served, once the server has shown that it can be used.

    Raises:
        EngineError: it cannot; says what is wrong with it, and with which flag to start it.
    """
    try:
        await client.call("/health")
        served = await _served(client, model, context)
        await _check(client, chat, served.name)
        return replace(served, precision=await _precision(client))
    except RequestError as error:
        raise EngineError(f"{client.url} does not take what is asked of it: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{client.url} does not answer as vLLM does: {error!r}") from error


async def _check(client: VllmClient, chat: ChatTokenizer, name: str) -> None:
    ids = chat.text_ids(_TEXT)
    text = _TEXT + chat.token_texts([chat.end_id])[chat.end_id]
    plain = await _ask(client, name, text)
    if tuple(plain.get("prompt_token_ids") or ()) != ids:
        raise EngineError(
            f"{client.url} has another tokenizer than the model folder: it reads {text!r} as"
            f" {plain.get('prompt_token_ids')}, the folder as {list(ids)}; name the folder"
            " that it was started with (and vLLM 0.11 or later)"
        )
    cold = await _ask(client, name, list(ids), temperature=_COLD, top_k=_KEPT)
    _check_logprobs(client.url, _tops(plain), _tops(cold))


async def _served(client: VllmClient, model: str, context: int | None) -> Served:
    shown = (await client.call("/v1/models"))["data"]
    # An adapter's card names its model as the parent.
    cards = {card["id"]: card for card in shown if not card.get("parent")}
    name = model or (next(iter(cards)) if len(cards) == 1 else "")
    if name not in cards:
        found = f"no model {name!r}" if name else "several models"
        raise EngineError(f"{client.url} serves {found}; choose with `served`: {', '.join(cards)}")
    longest = cards[name].get("max_model_len") or context
    if longest is None:
        raise EngineError(f"{client.url} does not say how long {name} is; say it with `context`")
    return Served(name, min(longest, context or longest))


async def _precision(client: VllmClient) -> str:
    """A torch dtype's name, such as `bfloat16`; servers in development mode say it."""
    try:
        said = await client.call("/server_info")
    except EngineGoneError:
        raise
    except EngineError:
        return ""
    found = re.search(r"\bdtype=torch\.(\w+)", str(said))
    return found[1] if found else ""


async def _ask(client: VllmClient, name: str, prompt: str | list[int], **changes: Any) -> Any:
    body = {
        "model": name,
        "prompt": prompt,
        "add_special_tokens": False,
        "max_tokens": 1,
        "logprobs": _SHOWN,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "ignore_eos": True,
        **NEUTRAL,
        **changes,
    }
    return (await client.call("/v1/completions", body))["choices"][0]


def _tops(choice: Any) -> dict[str, float]:
    (tops,) = choice["logprobs"]["top_logprobs"]
    return {token: value for token, value in tops.items() if value > _NEVER}


def _check_logprobs(url: str, plain: dict[str, float], cold: dict[str, float]) -> None:
    """Of the few tokens that a cut left, the probabilities are all; and cold has driven them apart."""
    total = sum(map(math.exp, cold.values()))
    both = sorted(plain.keys() & cold.keys(), key=plain.__getitem__)
    apart = plain[both[-1]] - plain[both[0]] if both else 0.0
    seen = cold[both[-1]] - cold[both[0]] if both else 0.0
    is_scaled = apart < _CLEAR or seen > apart * (1 + 1 / _COLD) / 2
    if abs(total - 1) > _WHOLE or not is_scaled:
        raise EngineError(
            f"{url} gives the model's own log-probabilities, not those of the distribution that it draws from"
            f" (of {_KEPT} tokens at temperature {_COLD} they sum to {total:.3f}): start it with"
            " --logprobs-mode processed_logprobs"
        )
