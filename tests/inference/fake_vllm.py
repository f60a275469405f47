"""A vLLM server as far as katcore asks one: its protocol, over a tiny model that really samples.

Written from vLLM's `CompletionRequest`, `CompletionResponse`, sampler and error shapes. A field that vLLM
does not know is refused here, where vLLM ignores it. `python -m tests.inference.fake_vllm` takes the
arguments of the real server that it needs, and ignores the others.
"""

import argparse
import asyncio
import copy
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

_KNOWN = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "stop_token_ids", "ignore_eos",
    "return_token_ids", "return_tokens_as_token_ids", "add_special_tokens",
    "prompt_logprobs",
}  # fmt: skip
_DEFAULTS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def problem(status: int, message: str, kind: str = "BadRequestError") -> web.Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return web.json_response({"error": error}, status=status)


class FakeVllm:
    """One model. `defaults` stand for its `generation_config.json`; `mode` is `--logprobs-mode`."""

    def __init__(
        self,
        model: Path,
        *,
        context: int,
        mode: str = "processed_logprobs",
        key: str = "",
        names: tuple[str, ...] = ("tiny",),
        takes_weights: bool = True,
    ) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
        self.model: Any = _load(model)
        self.context, self.mode, self.key, self.names = context, mode, key, names
        self.takes_weights = takes_weights
        self.precision = ""
        self.defaults: dict[str, Any] = {}
        self.trouble: web.Response | None = None
        self.spoil: Callable[[dict[str, Any]], None] = lambda _: None
        self.delay_s = 0.0
        self.adapters: dict[str, Any] = {}
        self.awake = {"weights", "kv_cache"}
        self.calls: list[str] = []
        self.num_aborted = 0
        self.num_running = 0
        self._is_open = asyncio.Event()
        self._is_open.set()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 24)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        if self.takes_weights:
            app.router.add_post("/pause", self._pause)
            app.router.add_get("/server_info", self._info)
            app.router.add_post("/resume", self._resume)
            app.router.add_post("/collective_rpc", self._collective_rpc)
            app.router.add_post("/reset_prefix_cache", self._reset)
            app.router.add_post("/sleep", self._sleep)
            app.router.add_post("/wake_up", self._wake_up)
            app.router.add_post("/v1/load_lora_adapter", self._load_adapter)
            app.router.add_post("/v1/unload_lora_adapter", self._unload_adapter)
        return app

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[str]:
        runner = web.AppRunner(self.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", port)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> Any:
        self.calls.append(request.path)
        is_guarded = request.path.startswith(("/v1", "/v2", "/inference"))
        if self.key and is_guarded and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return web.json_response({"detail": "Not Found"}, status=404)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _info(self, _: web.Request) -> web.Response:
        if not self.precision:
            raise web.HTTPNotFound
        shown = f"model='m', dtype=torch.{self.precision}, kv_cache_dtype=auto, max_seq_len=8"
        return web.json_response({"vllm_config": shown})

    async def _models(self, _: web.Request) -> web.Response:
        cards = [
            {"id": name, "object": "model", "max_model_len": self.context} for name in self.names
        ]
        cards += [{"id": name, "parent": self.names[0]} for name in self.adapters]
        return web.json_response({"object": "list", "data": cards})

    async def _pause(self, request: web.Request) -> web.Response:
        assert request.query["mode"] == "wait"
        self._is_open.clear()
        return web.json_response({"status": "paused"})

    async def _resume(self, _: web.Request) -> web.Response:
        self._is_open.set()
        return web.json_response({"status": "resumed"})

    async def _sleep(self, request: web.Request) -> web.Response:
        assert not self.num_running
        self.awake.clear()
        if request.query["level"] == "2":
            self.model = None
        return web.Response()

    async def _wake_up(self, request: web.Request) -> web.Response:
        self.awake |= set(request.query.getall("tags", ["weights", "kv_cache"]))
        return web.Response()

    async def _load_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return problem(400, f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_config.json").exists():
            return problem(404, f"No adapter found for {folder}", "NotFoundError")
        self.adapters[name] = _with_adapter(self.model, folder)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        del self.adapters[(await request.json())["lora_name"]]
        return web.Response(text="Success")

    async def _reset(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["method"] == "reload_weights"
        assert "weights" in self.awake
        try:
            self.model = _load(body["kwargs"]["weights_path"])
        except (OSError, ValueError) as error:
            return problem(500, f"Cannot find any model weights: {error}", "InternalServerError")
        return web.json_response({"results": [None]})

    async def _completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.trouble is not None:
            return self.trouble
        await self._is_open.wait()
        if unknown := body.keys() - _KNOWN:
            return problem(400, f"no such fields: {unknown}")
        if len(self.awake) < 2:
            return problem(503, "The model is sleeping.", "ServiceUnavailableError")
        if body["model"] not in (*self.names, *self.adapters):
            return problem(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= body.get(name, 0) <= 2:
                return problem(400, f"{name} must be in [-2, 2], got {body[name]}.")
        prompt = body["prompt"]
        if isinstance(prompt, str):
            special = body.get("add_special_tokens", True)
            prompt = self.tokenizer.encode(prompt, add_special_tokens=special)
        wanted = body.get("max_tokens", 16)
        if len(prompt) + wanted > self.context:
            return problem(
                400,
                f"You passed {len(prompt)} input tokens and requested {wanted} output tokens. However, the"
                f" model's context length is only {self.context} tokens.",
            )
        self.num_running += 1
        try:
            choice = await self._choice(prompt, wanted, _DEFAULTS | self.defaults | body)
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise
        finally:
            self.num_running -= 1
        answer = {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}
        self.spoil(answer)
        return web.json_response(answer)

    async def _choice(self, prompt: list[int], wanted: int, body: dict[str, Any]) -> dict[str, Any]:
        random = torch.Generator()
        if body.get("seed") is None:
            random.seed()
        else:
            random.manual_seed(body["seed"])
        ends = set(body.get("stop_token_ids") or ())
        if not body.get("ignore_eos"):
            ends.add(self.tokenizer.eos_token_id)
        ids: list[int] = []
        shown: list[dict[str, float]] = []
        while len(ids) < wanted and not (ids and ids[-1] in ends):
            await asyncio.sleep(self.delay_s)
            logprobs, token = self._draw(prompt, ids, body, random)
            tops = [token, *logprobs.topk(body.get("logprobs") or 0).indices.tolist()]
            shown.append({self._name(n, body): max(float(logprobs[n]), -9999.0) for n in tops})
            ids.append(token)
        is_end = ids[-1] in ends
        scored = (
            {} if body.get("prompt_logprobs") is None else {"prompt_logprobs": self._scored(prompt)}
        )
        if body.get("logprobs") is None:
            return {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"} | scored
        return scored | {
            "index": 0,
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "logprobs": {
                "text_offset": [0] * len(ids),
                "tokens": [self._name(token, body) for token in ids],
                "token_logprobs": [next(iter(tops.values())) for tops in shown],
                "top_logprobs": shown,
            },
            "finish_reason": "stop" if is_end else "length",
            "stop_reason": ids[-1] if is_end else None,
            "token_ids": ids if body.get("return_token_ids") else None,
            "prompt_token_ids": prompt if body.get("return_token_ids") else None,
        }

    def _scored(self, prompt: list[int]) -> list[dict[str, Any] | None]:
        """As vLLM: of the model's own distribution, whatever the temperature; nothing of the first id."""
        with torch.inference_mode():
            logprobs = self.model(torch.tensor([prompt])).logits[0, :-1].log_softmax(1)
        rows = zip(logprobs, prompt[1:], strict=True)
        return [
            None,
            *({str(token): {"logprob": float(row[token]), "rank": 1}} for row, token in rows),
        ]

    def _name(self, token: int, body: dict[str, Any]) -> str:
        if body.get("return_tokens_as_token_ids"):
            return f"token_id:{token}"
        return str(self.tokenizer.decode([token]))

    def _draw(
        self, prompt: list[int], ids: list[int], body: dict[str, Any], random: torch.Generator
    ) -> tuple[torch.Tensor, int]:
        model = self.adapters.get(body["model"], self.model)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids])).logits[0, -1]
        raw, logits = logits.clone(), logits.clone()
        seen, repeated = torch.tensor(prompt + ids), body["repetition_penalty"]
        logits[seen] = torch.where(
            logits[seen] > 0, logits[seen] / repeated, logits[seen] * repeated
        )
        for token, count in Counter(ids).items():
            logits[token] -= body["frequency_penalty"] * count + body["presence_penalty"]
        is_greedy = body["temperature"] < 1e-5
        token = int(logits.argmax())
        if not is_greedy:
            logits = _cut(logits / body["temperature"], body["top_k"], body["top_p"])
            token = int(logits.softmax(0).multinomial(1, generator=random))
        which = {"raw": raw, "processed": logits}[self.mode.split("_")[0]]
        return which.log_softmax(0) if self.mode.endswith("logprobs") else which, token


def _cut(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """As vLLM: what is below the k-th goes, ties stay; then the improbable tail of mass 1 - p goes."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort()
        tail = ordered.softmax(0).cumsum(0) <= 1 - top_p
        tail[-1] = False
        logits = logits.scatter(0, order, ordered.masked_fill(tail, -torch.inf))
    return logits


def _load(folder: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def _with_adapter(model: Any, folder: Path) -> Any:
    """The model with a low-rank adapter in the form of `peft` added to its weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    made, weights = copy.deepcopy(model), load_file(folder / "adapter_model.safetensors")
    for name, down in weights.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = weights[name.replace("lora_A", "lora_B")]
            with torch.no_grad():
                made.get_submodule(module).weight.add_(scale * up @ down)
    return made


async def _serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--served-model-name")
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--logprobs-mode")
    given, _ = parser.parse_known_args()
    fake = FakeVllm(
        given.model,
        context=given.max_model_len,
        mode=given.logprobs_mode,
        key=os.environ["VLLM_API_KEY"],
        names=(given.served_model_name,),
        takes_weights=os.environ.get("VLLM_SERVER_DEV_MODE") == "1",
    )
    async with fake.serving(given.port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve())
