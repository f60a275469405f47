"""A random Llama of a few thousand parameters, and its tokenizer."""

from pathlib import Path

from katcore.config import ModelSettings
from katcore.schema.call import EngineRequest, Sampling
from katcore.train.policy import new_policy, save_policy
from katcore.train.tokenizer import END, train_tokenizer

CONTEXT = 96


def write_tiny_model(folder: Path) -> Path:
    texts = ["ls cat echo the quick brown fox > file.txt\n", "def f(x):\n    return x + 1\n"] * 3
    tokenizer = train_tokenizer(texts, vocabulary=300, folder=folder)
    settings = ModelSettings(hidden=32, layers=2, heads=4, kv_heads=2, context=CONTEXT)
    end_id = tokenizer.encode(END).ids[0]
    model = new_policy(settings, vocabulary=tokenizer.get_vocab_size(), end_id=end_id, seed=3)
    save_policy(model, folder, tokenizer=folder)
    return folder


def request(
    session: str, ids: tuple[int, ...], *, temperature: float = 0.0, max_tokens: int = 12
) -> EngineRequest:
    return EngineRequest(session, ids, Sampling(temperature, max_tokens))
