"""What Gemini's dialect has that its own client does not show."""

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from katcore.proxy import gemini
from katcore.proxy.dialect import Problem
from katcore.proxy.server import Proxy
from katcore.proxy.session import SessionSpec
from katcore.schema.call import Sampling
from tests.proxy.fakes import FakeEngine

LOOK = {"functionCall": {"name": "look", "args": {"at": 1}}}
READ = {"functionCall": {"name": "read"}}


def parsed(*contents: dict[str, Any], **more: Any) -> Any:
    return gemini.parse({"model": "m", "contents": list(contents), **more})


def result(name: str, response: dict[str, Any]) -> dict[str, Any]:
    return {"functionResponse": {"name": name, "response": response}}


def test_results_without_ids_belong_to_the_calls_of_that_name_in_order() -> None:
    found = parsed(
        {"role": "user", "parts": [{"text": "go"}]},
        {"role": "model", "parts": [{"text": "hm", "thought": True}, LOOK, READ, LOOK]},
        {
            "role": "user",
            "parts": [
                result("look", {"output": "first"}),
                result("look", {"error": "second"}),
                result("read", {"output": "third"}),
                {"text": "and?"},
            ],
        },
        {"role": "model", "parts": [READ]},
        {"role": "function", "parts": [result("read", {"output": "fourth", "lines": 1})]},
    ).messages
    asked, again = (message for message in found if message.role == "assistant")
    assert (asked.reasoning, asked.content) == ("hm", "")
    ids = [call.id for call in (*asked.tool_calls, *again.tool_calls)]
    assert len(set(ids)) == 4
    assert [(item.tool_call_id, item.content) for item in found if item.role == "tool"] == [
        (ids[0], "first"),
        (ids[2], '{"error":"second"}'),
        (ids[1], "third"),
        (ids[3], '{"output":"fourth","lines":1}'),
    ]
    assert [item.content for item in found if item.role == "user"] == ["go", "and?"]


def test_types_in_capitals_are_those_of_a_schema() -> None:
    parameters = {
        "type": "OBJECT",
        "properties": {
            "type": {"type": "STRING"},
            "n": {"type": "ARRAY", "items": {"type": "INTEGER"}},
        },
        "required": ["type"],
    }
    tools = [
        {"function_declarations": [{"name": "f", "parameters": parameters}]},
        {"googleSearch": {}},
    ]
    (tool,) = parsed({"parts": [{"text": "x"}]}, tools=tools).tools
    assert json.loads(tool.parameters) == {
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            "n": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["type"],
    }


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"contents": []}, "contents"),
        ({"generationConfig": {"candidateCount": 2}}, "generationConfig.candidateCount"),
        ({"generationConfig": {"maxOutputTokens": 0}}, "generationConfig.maxOutputTokens"),
        ({"contents": [{"parts": [{"functionCall": {}}]}]}, "contents.0.parts.0.functionCall.name"),
    ],
)
def test_a_field_that_is_not_right_is_named(more: dict[str, Any], field: str) -> None:
    with pytest.raises(Problem) as caught:
        gemini.parse({"model": "m", "contents": [{"parts": [{"text": "x"}]}], **more})
    assert caught.value.message.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("verb", "status", "said"),
    [
        ("streamGenerateContent", 400, "ask for alt=sse"),
        ("embedContent", 404, "no method 'embedContent'"),
    ],
)
async def test_what_is_not_served_says_so(
    tmp_path: Path, verb: str, status: int, said: str
) -> None:
    async with Proxy(tmp_path / "calls.jsonl") as proxy, aiohttp.ClientSession() as client:
        _, endpoint = proxy.open(SessionSpec("s", FakeEngine(), Sampling(max_tokens=100)))
        url = f"{endpoint.base_url}/v1beta/models/{endpoint.model}:{verb}"
        body = {"contents": [{"parts": [{"text": "x"}]}]}
        headers = {"x-goog-api-key": endpoint.api_key}
        async with client.post(url, json=body, headers=headers) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"]) == (status, status)
        assert said in error["message"]
