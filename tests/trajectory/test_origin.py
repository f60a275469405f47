"""Which answers each algorithm takes, and ids made from text where a service gave none."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from katcore.errors import StageError
from katcore.inference.bytes import write_byte_tokenizer
from katcore.inference.chat import ChatTokenizer
from katcore.plugin import Plugins
from katcore.schema.call import Message, Origin, Tool
from katcore.schema.rollout import Outcome, Rollout
from katcore.trajectory.formats import TreeConfig, TreeFormatter
from katcore.trajectory.origin import (
    DistillTreeConfig,
    DistillTreeFormatter,
    RlTreeConfig,
    RlTreeFormatter,
    SftTreeConfig,
    SftTreeFormatter,
    tokenised,
)
from tests.proxy.fakes import END, FakeEngine
from tests.trajectory.made import Recorder, call, rollout, sessions

STRICT = {
    "rl_tree": RlTreeFormatter(RlTreeConfig()),
    "distill_tree": DistillTreeFormatter(DistillTreeConfig()),
}


class Encoder(FakeEngine):
    def answer_ids(
        self, message: Message, tools: Sequence[Tool], history: Sequence[Message] = ()
    ) -> tuple[int, ...]:
        called = "".join(f"<{call.name}{call.arguments}>" for call in message.tool_calls)
        return (*map(ord, message.content + called), END)


def of_origin(origin: Origin, number: int = 1) -> Rollout:
    first = call(0, (1,), (2,))
    made = rollout([first, call(1, (3,), (4,), first)])
    turns = list(made.trajectory.turns)
    turns[number] = replace(turns[number], origin=origin)
    return replace(made, trajectory=replace(made.trajectory, turns=tuple(turns)))


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("origin", ["scripted", "api", "tokenised"])
def test_only_sampled_answers_are_reinforced_and_distilled(name: str, origin: Origin) -> None:
    wanted = f"rollout s: turn 1 is of origin '{origin}', and {name} takes only 'sampled' turns"
    with pytest.raises(StageError, match=wanted):
        list(STRICT[name].samples([of_origin(origin)]))
    unscored = replace(of_origin(origin), outcome=Outcome.CANCELLED)
    assert not list(STRICT[name].samples([unscored]))


@pytest.mark.parametrize("name", STRICT)
def test_sampled_answers_give_the_same_tree(name: str) -> None:
    made = [of_origin("sampled")]
    assert list(STRICT[name].samples(made)) == list(TreeFormatter(TreeConfig()).samples(made))


def test_a_turn_that_is_not_trained_may_be_of_any_origin() -> None:
    made = of_origin("api")
    turns = made.trajectory.turns
    turns = (turns[0], replace(turns[1], role="auxiliary"))
    made = replace(made, trajectory=replace(made.trajectory, turns=turns))
    assert len(list(STRICT["rl_tree"].samples([made]))) == 1


@pytest.mark.parametrize("origin", ["sampled", "scripted", "tokenised"])
def test_supervised_training_takes_whatever_has_ids(origin: Origin) -> None:
    (sample,) = SftTreeFormatter(SftTreeConfig()).samples([of_origin(origin)])
    assert sample.tokens == (1, 2, 3, 4)
    assert sample.origin == ("sampled" if origin == "sampled" else "tokenised")


def test_without_a_tokenizer_an_answer_without_ids_is_refused() -> None:
    with pytest.raises(
        StageError, match=r"turn 1 .* 'api', so it has no ids; give sft_tree a `tokenizer`"
    ):
        list(SftTreeFormatter(SftTreeConfig()).samples([of_origin("api")]))


def without_ids(made: Rollout) -> Rollout:
    turns = tuple(
        replace(turn, num_shared=0, prompt_ids=(), ids=(), logprobs=(), origin="api")
        for turn in made.trajectory.turns
    )
    return replace(made, trajectory=replace(made.trajectory, turns=turns))


@given(sessions())
def test_ids_made_from_text_are_those_that_were_sampled_where_one_tokenizer_did_both(
    session: Recorder,
) -> None:
    given_ids = rollout(session.calls)
    made = without_ids(given_ids)
    again = tokenised(made.trajectory, Encoder())
    wanted = list(TreeFormatter(TreeConfig()).samples([given_ids]))
    found = list(SftTreeFormatter(SftTreeConfig(), Encoder()).samples([made]))
    assert [turn.ids for turn in again.turns] == [one.generation.ids for one in session.calls]
    assert [sample.tokens for sample in found] == [sample.tokens for sample in wanted]
    assert [sample.trained for sample in found] == [sample.trained for sample in wanted]
    assert {sample.origin for sample in found} <= {"tokenised"}
    assert not any(logprob for sample in found for logprob in sample.logprobs)


def test_the_offers_are_installed() -> None:
    plugins = Plugins.installed()
    names = {"atif", "chat", "distill_tree", "rl_tree", "rows", "sft_tree", "tree"}
    assert names <= set(plugins.names("formatter"))
    for name in names:
        assert not list(plugins.make("formatter", name).samples([]))


def test_the_offer_takes_a_model_folder_as_its_tokenizer(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path)
    session = Recorder()
    history = [Message("user", "list")]
    history += [session.say(history, "ls"), Message("user", "a.py")]
    session.say(history, "done")
    made = without_ids(rollout(session.calls))
    formatter = Plugins.installed().make("formatter", "sft_tree", {"tokenizer": folder})
    (sample,) = formatter.samples([made])
    chat = ChatTokenizer(folder)
    trained = [token for token, mark in zip(sample.tokens, sample.trained, strict=True) if mark]
    assert chat.decode(trained) == "lsdone"
    assert sample.parents == tuple(range(-1, len(sample.tokens) - 1))
    whole = [*history, Message("assistant", "done")]
    assert list(sample.tokens[: len(chat.encode(whole[:1]))]) == list(chat.encode(whole[:1]))
    assert sample.origin == "tokenised"
