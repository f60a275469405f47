"""What both dialects of OpenAI share: errors.

Wire format: https://platform.openai.com/docs/guides/error-codes.
"""

from typing import Any

from katcore.proxy.dialect import Kind, Problem

_ERRORS: dict[Kind, tuple[str, str | None]] = {
    "invalid": ("invalid_request_error", None),
    "authentication": ("invalid_request_error", "invalid_api_key"),
    "not-found": ("invalid_request_error", "model_not_found"),
    "too-large": ("invalid_request_error", "request_too_large"),
    "busy": ("rate_limit_error", "rate_limit_exceeded"),
    "context": ("invalid_request_error", "context_length_exceeded"),
    "budget": ("invalid_request_error", "budget_exhausted"),
    "engine": ("server_error", "engine_failed"),
    "proxy": ("server_error", "proxy_failed"),
}


def problem(problem: Problem) -> dict[str, Any]:
    """See `Dialect.problem`."""
    kind, code = _ERRORS[problem.kind]
    return {"error": {"message": problem.message, "type": kind, "param": None, "code": code}}
