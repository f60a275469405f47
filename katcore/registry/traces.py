"""Rollouts as MLflow traces: spans for the rollout, each model call and each tool call, and the reward."""

from collections.abc import Iterable, Mapping
from typing import Any

import mlflow
from mlflow.entities import AssessmentSource, LiveSpan, SpanType

from katcore.config import home
from katcore.registry.location import tracking_uri
from katcore.registry.store import experiment_id
from katcore.schema.call import Message, ToolCall
from katcore.schema.rollout import Rollout, Turn

_NS = 1_000_000_000


def log_rollouts(experiment: str, rollouts: Iterable[Rollout]) -> list[str]:
    """Make a trace of each rollout that has turns; returns the traces' ids."""
    number = experiment_id(experiment)
    mlflow.set_tracking_uri(tracking_uri(home()))
    made = [(rollout, _log(number, rollout)) for rollout in rollouts if rollout.trajectory.turns]
    mlflow.flush_trace_async_logging()
    for rollout, trace in made:
        if rollout.reward is not None:
            mlflow.log_feedback(
                trace_id=trace,
                name="reward",
                value=rollout.reward,
                source=AssessmentSource(source_type="CODE", source_id="verifier"),
                rationale=rollout.verdict.reason or None,
            )
    return [trace for _, trace in made]


def _log(experiment: str, rollout: Rollout) -> str:
    turns = rollout.trajectory.turns
    root = mlflow.start_span_no_context(
        rollout.task_id,
        span_type=SpanType.AGENT,
        inputs={"messages": _messages(turns[0].messages)},
        attributes=_facts(rollout),
        tags={"rollout": rollout.id, "task": rollout.task_id, "outcome": rollout.outcome.value},
        experiment_id=experiment,
        start_time_ns=_ns(turns[0].started_s),
    )
    results = {
        message.tool_call_id: (message.content, turn.started_s)
        for turn in turns
        for message in turn.messages
        if message.role == "tool"
    }
    for turn in turns:
        _log_turn(root, turn, results)
    last_s = max(turn.started_s + turn.seconds for turn in turns)
    outputs = {"answer": turns[-1].text, "exit_reason": rollout.exit_reason, "error": rollout.error}
    root.end(outputs=outputs, end_time_ns=_ns(last_s))
    return str(root.trace_id)


def _log_turn(root: LiveSpan, turn: Turn, results: Mapping[str, tuple[str, float]]) -> None:
    ended_s = turn.started_s + turn.seconds
    span = mlflow.start_span_no_context(
        turn.role,
        span_type=SpanType.CHAT_MODEL,
        parent_span=root,
        inputs={"messages": _messages(turn.messages)},
        attributes={
            "policy_version": turn.policy_version,
            "origin": turn.origin,
            "exact": str(turn.is_exact),
            "prompt_tokens": str(turn.num_shared + len(turn.prompt_ids)),
            "sampled_tokens": str(len(turn.ids)),
        },
        start_time_ns=_ns(turn.started_s),
    )
    span.end(outputs={"message": _messages([turn.message])[0]}, end_time_ns=_ns(ended_s))
    for call in turn.tool_calls:
        said, until_s = results.get(call.id, ("", ended_s))
        tool = mlflow.start_span_no_context(
            call.name,
            span_type=SpanType.TOOL,
            parent_span=root,
            inputs={"arguments": call.arguments},
            start_time_ns=_ns(ended_s),
        )
        tool.end(outputs={"result": said}, end_time_ns=_ns(max(ended_s, until_s)))


def _messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "content": message.content,
            **(
                {"tool_calls": [_call(call) for call in message.tool_calls]}
                if message.tool_calls
                else {}
            ),
        }
        for message in messages
    ]


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _facts(rollout: Rollout) -> dict[str, str]:
    return {
        "rollout": rollout.id,
        "scaffold": rollout.scaffold,
        "outcome": rollout.outcome.value,
        "attempt": str(rollout.attempt),
        "exit_reason": rollout.exit_reason,
    }


def _ns(seconds: float) -> int:
    return int(seconds * _NS)
