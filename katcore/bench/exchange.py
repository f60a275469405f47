"""What is said in the benchmark of the proxy: unique conversations, one fixed answer, and its check."""

import random
from dataclasses import dataclass

import orjson

MODEL = "policy"
_WORDS = (
    "the", "build", "fails", "when", "a", "path", "holds", "spaces", "and", "tests", "that", "read", "it",
    "see", "nothing", "so", "open", "file", "line", "error", "value", "index", "return", "import", "module",
    "check", "again", "before", "after", "result", "expected", "actual",
)  # fmt: skip
_ROLES = ("system", "user", "assistant", "user", "assistant", "user")
_NUM_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as a client read it off the wire: the call's id, and the text."""

    id: str
    text: str


def answer_chunks(num: int) -> tuple[str, ...]:
    """The fixed answer, in `num` pieces."""
    return (*(f"{_WORDS[at % len(_WORDS)]} " for at in range(num - 1)), "done")


def body(stream: int, number: int, *, is_streamed: bool) -> bytes:
    """Request `number` of a stream: six messages, 4 kB, alike to no other from its first words on."""
    choose = random.Random(f"{stream}/{number}")
    messages = [{"role": role, "content": _text(choose)} for role in _ROLES]
    asked = {"model": MODEL, "messages": messages, "stream": is_streamed}
    usage = {"stream_options": {"include_usage": True}} if is_streamed else {}
    return orjson.dumps(asked | usage)


def read_answer(data: bytes, *, is_streamed: bool) -> Answer:
    """An answer of Chat Completions.

    Raises:
        ValueError: it is an error, or not whole.
    """
    if not is_streamed:
        whole = orjson.loads(data)
        return Answer(whole["id"], whole["choices"][0]["message"]["content"])
    call_id, text, finish = "", "", None
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
    if not lines or lines[-1].strip() != b"[DONE]":
        raise ValueError("the stream has no end")
    for line in lines[:-1]:
        chunk = orjson.loads(line)
        if "error" in chunk:
            raise ValueError(f"an error in the stream: {chunk['error']}")
        call_id = chunk["id"]
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            finish = choice.get("finish_reason") or finish
    if finish is None:
        raise ValueError("the stream does not say why it ended")
    return Answer(call_id, text)


def _text(choose: random.Random) -> str:
    words = choose.choices(_WORDS, k=_NUM_CHARS // len(_ROLES) // 6)
    return f"{choose.getrandbits(64):x} {' '.join(words)}"
