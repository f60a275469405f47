"""The base model: a tokenizer and generic pretraining that know nothing of the installed experts.

The first steps have nothing but the shortest drills (`katcore.train.drill`), of which only the assistant's
tokens are trained: copying is what takes longest to learn, and it is learnt soonest where nothing else is.
Then each step has three sources: windows of the source text of Python's standard library; drills of all
kinds; and random ids said twice, of which only the second saying is trained (what induction heads are made
of, arXiv 2209.11895).
"""

import random
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from katcore.config import BaseTrainingSettings, ModelSettings, OptimizerSettings
from katcore.schema.sample import Sample
from katcore.train.drill import Conversation, Drills
from katcore.train.objective import Metrics, Sft
from katcore.train.policy import new_policy, save_policy
from katcore.train.tokenizer import ASSISTANT, END, USER, train_tokenizer
from katcore.train.trainer import Schedule, Trainer

_MODULES = (
    "argparse", "ast", "bisect", "calendar", "cmd", "collections/__init__", "colorsys", "configparser",
    "copy", "csv", "dataclasses", "difflib", "fileinput", "fnmatch", "fractions", "functools", "glob",
    "heapq", "inspect", "ipaddress", "json/decoder", "json/encoder", "linecache", "locale", "mailbox",
    "numbers", "operator", "optparse", "os", "pathlib", "posixpath", "pprint", "random", "re/__init__",
    "reprlib", "sched", "shelve", "shlex", "shutil", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "tokenize", "traceback", "types", "typing", "unittest/case", "urllib/parse",
    "uuid", "zipfile",
)  # fmt: skip


def train_base(
    model: ModelSettings,
    settings: BaseTrainingSettings,
    *,
    seed: int,
    out: Path,
    checkpoint: Path,
    report: Callable[[int, Metrics], None],
) -> None:
    """Train tokenizer and model; `out` gets the model folder. Continues from `checkpoint`."""
    texts = corpus()
    words = frequent_words(texts)
    lines = code_lines(texts)
    drills = Drills(words, lines, seed)
    sample_text = [
        "\n".join(user + "\n" + answer for user, answer in drills.draw()) for _ in range(4000)
    ]
    tokenizer = train_tokenizer([*texts, *sample_text], vocabulary=model.vocabulary, folder=out)
    end_id = tokenizer.encode(END).ids[0]
    policy: Any = new_policy(model, vocabulary=tokenizer.get_vocab_size(), end_id=end_id, seed=seed)
    schedule = Schedule(settings.lr, settings.steps, settings.warmup, 0.1)
    trainer = Trainer(policy, schedule, optimizer=OptimizerSettings(weight_decay=0.01))
    trainer.load(checkpoint)
    streams = _Streams(tokenizer, texts, words, lines)
    while trainer.step_number < settings.steps:
        step = trainer.step_number
        number = seed * 1_000_003 + step
        if step < settings.first_steps:
            rows = streams.draw_first(settings, number)
        else:
            rows = streams.draw(settings, number)
        report(step, trainer.update(rows, Sft()))
        if (step + 1) % 50 == 0:
            trainer.save(checkpoint)
    save_policy(policy, out, tokenizer=out)


def corpus() -> list[str]:
    """Source text of the running Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [root / f"{name}.py" for name in _MODULES]
    return [path.read_text(encoding="utf-8") for path in paths if path.exists()]


def frequent_words(texts: list[str], num: int = 600) -> list[str]:
    """The lower-case words of 3 to 8 letters that occur most."""
    counts = Counter(
        word for text in texts for word in text.split() if word.isalpha() and word.islower()
    )
    usable = [word for word, _ in counts.most_common() if 3 <= len(word) <= 8 and word.isascii()]
    return usable[:num]


def code_lines(texts: list[str]) -> list[str]:
    """Lines of source text of 4 to 60 characters, without comments and blank ones, in order."""
    lines = (line.rstrip() for text in texts for line in text.splitlines())
    return [
        line for line in lines if 4 <= len(line) <= 60 and not line.strip().startswith(("#", '"'))
    ]


class _Streams:
    """Rows from the three sources."""

    def __init__(
        self, tokenizer: Tokenizer, texts: list[str], words: list[str], lines: list[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._words = words
        self._lines = lines
        self._end_id = tokenizer.encode(END).ids[0]
        self._text_ids: list[int] = []
        for text in texts:
            self._text_ids += tokenizer.encode(text).ids

    def draw_first(self, settings: BaseTrainingSettings, seed: int) -> list[Sample]:
        """A step's rows in the beginning."""
        drills = Drills(self._words, self._lines, seed)
        return [self._conversation(drills.draw_first()) for _ in range(settings.first_drills)]

    def draw(self, settings: BaseTrainingSettings, seed: int) -> list[Sample]:
        """A step's rows; they depend on the seed alone."""
        choose = random.Random(seed)
        drills = Drills(self._words, self._lines, seed)
        rows = [self._conversation(drills.draw()) for _ in range(settings.drills)]
        rows += [self._twice(choose) for _ in range(settings.repeats)]
        for _ in range(settings.windows):
            start = choose.randrange(len(self._text_ids) - settings.length)
            ids = self._text_ids[start : start + settings.length]
            rows.append(_sample(ids, [True] * len(ids)))
        return rows

    def _twice(self, choose: random.Random) -> Sample:
        size = self._tokenizer.get_vocab_size()
        before, ids = (
            [choose.randrange(self._end_id + 1, size) for _ in range(num)]
            for num in (choose.randint(0, 16), choose.randint(3, 16))
        )
        context = [*before, *ids, self._end_id]
        return _sample([*context, *ids], [False] * len(context) + [True] * len(ids))

    def _conversation(self, conversation: Conversation) -> Sample:
        ids: list[int] = []
        trained: list[bool] = []
        for user, answer in conversation:
            for text, is_trained in (
                (f"{USER}{user}{END}{ASSISTANT}", False),
                (f"{answer}{END}", True),
            ):
                part = self._tokenizer.encode(text).ids
                ids += part
                trained += [is_trained] * len(part)
        return _sample(ids, trained)


def _sample(ids: list[int], trained: list[bool]) -> Sample:
    num = len(ids)
    return Sample(
        tuple(ids),
        tuple(range(-1, num - 1)),
        (False, *trained[1:]),
        (0.0,) * num,
        (1,) * num,
        "pretraining",
        "",
        "",
        None,
        "tokenised",
        "",
    )
