"""Error bodies in the shape that the client's library expects. Pure."""

import json
from typing import Any

from spark_llm.reason import Reason

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    """Whether ``path`` is answered in Anthropic's shape."""
    return path.startswith("/v1/messages")


def error_body(path: str, status: int, reason: Reason, message: str) -> bytes:
    """JSON of an error: Anthropic-shaped below ``/v1/messages``, OpenAI-shaped elsewhere."""
    return json.dumps(_error(path, status, reason, message)).encode()


def error_event(path: str, status: int, reason: Reason, message: str) -> bytes:
    """The same as the last server-sent event of a stream that cannot go on."""
    name = b"event: error\n" if is_anthropic(path) else b""
    return name + b"data: " + error_body(path, status, reason, message) + b"\n\n"


def _error(path: str, status: int, reason: Reason, message: str) -> dict[str, object]:
    if is_anthropic(path):
        kind = _ANTHROPIC_TYPES.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": message, "code": reason}}
    kind = _OPENAI_TYPES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": reason}}


def aborted(answer: bytes) -> bool:
    """Whether an answer that says 200 was in truth cut off by the engine.

    vLLM 0.32.0 answers a request that arrives while it drains, or is aborted by it, with 200, no text and the finish
    reason "abort" (v1/engine/core.py, ``_reject_add_in_shutdown``). In Anthropic's shape a finished message then has no
    stop reason, in the Responses API the status is "cancelled". The same words in a tool's arguments mean nothing, so
    what looks like it is parsed.

    Args:
        answer: the whole JSON of an answer that is not streamed.
    """
    return any(word in answer for word in _WHOLE_TELLTALES) and _cut_off(_parsed(answer))


def aborted_in(events: bytes) -> bool:
    """The same of a piece of a stream.

    Args:
        events: whole server-sent events; each is judged by itself.
    """
    return any(word in events for word in _TELLTALES) and any(
        _cut_off(_parsed(line[5:])) for line in events.split(b"\n") if line.startswith(b"data:")
    )


_TELLTALES = (b'"abort"', b'"cancelled"', b'"message_delta"')
"""An event without these is whole, and not parsed. Each is looked for by itself, which is faster than an expression."""
_WHOLE_TELLTALES = (*_TELLTALES, b'"type":"message"', b'"type": "message"')


def _parsed(text: bytes) -> Any:  # noqa: ANN401  any JSON value
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _cut_off(value: Any) -> bool:  # noqa: ANN401  as above
    match value:
        case {"type": "message", **message}:
            return not message.get("stop_reason")
        case {"type": "message_delta", "delta": {**delta}}:
            return not delta.get("stop_reason")
        case {"object": "response", "status": status} | {"response": {"status": status}}:
            return bool(status == "cancelled")
        case {"choices": [*choices]}:
            return any(
                isinstance(choice, dict) and choice.get("finish_reason") == "abort"
                for choice in choices
            )
        case _:
            return False
