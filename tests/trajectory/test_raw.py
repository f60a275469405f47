"""Bodies come back from their differences, and cost little more than what is new in them."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katcore.errors import StageError
from katcore.schema.call import ModelCall
from katcore.trajectory.raw import Requests, restore
from tests.trajectory.made import call

_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
_BODY = st.dictionaries(st.sampled_from(["model", "messages", "tools", "stream"]), _VALUE)


def recorded(bodies: list[dict[str, Any]], parents: list[int]) -> list[ModelCall]:
    requests, calls = Requests(), []
    for number, (body, parent) in enumerate(zip(bodies, parents, strict=True)):
        one = call(number, (1,), (2,))
        before = f"c{parent}" if parent >= 0 else ""
        calls.append(replace(one, parent=before, raw=requests.delta(one.call_id, before, body)))
    return calls


@given(st.lists(_BODY, min_size=1, max_size=6), st.data())
def test_every_body_comes_back(bodies: list[dict[str, Any]], data: st.DataObject) -> None:
    parents = [data.draw(st.integers(-1, number - 1)) for number in range(len(bodies))]
    found = restore(recorded(bodies, parents))
    assert [found[f"c{number}"] for number in range(len(bodies))] == bodies


def test_a_long_history_costs_what_is_new_in_it() -> None:
    tools = [{"name": f"tool {n}", "description": "does a thing " * 30} for n in range(20)]
    messages: list[Any] = []
    bodies = []
    for number in range(200):
        messages.append(
            {"role": "user", "content": f"output {number} " + json.dumps([number] * 200)}
        )
        bodies.append({"model": "m", "tools": tools, "messages": list(messages)})
        messages.append({"role": "assistant", "content": f"answer {number}"})
    calls = recorded(bodies, list(range(-1, 199)))
    unique = len(json.dumps([tools, messages]))
    assert sum(len(one.raw) for one in calls) < unique


def test_a_damaged_body_is_an_error() -> None:
    (one,) = recorded([{"a": 1}], [-1])
    with pytest.raises(StageError, match="call c0: its body cannot be read"):
        restore([replace(one, raw=one.raw[:-3])])
    first, second = recorded([{"a": 1}, {"a": 1}], [-1, 0])
    with pytest.raises(StageError, match="call c1"):
        restore([second])
    assert restore([first, second])["c1"] == {"a": 1}
