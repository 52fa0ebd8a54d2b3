"""Error bodies in the shape that the client's library expects. Pure."""

import json

from spark_llm.reason import Reason

Headers = list[tuple[bytes, bytes]]

_OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
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


def aborted(body: bytes) -> bool:
    """Whether an answer that says 200 was in truth cut off by the engine.

    vLLM 0.32.0 answers a request that arrives while it drains, or is aborted by it, with 200, no text and the finish
    reason "abort" (v1/engine/core.py, ``_reject_add_in_shutdown``). In Anthropic's shape that is a null stop reason in
    a finished message, in the Responses API the status "cancelled". Quotes in a model's own text are escaped in JSON,
    so these bytes cannot come from it.
    """
    if b'"finish_reason":"abort"' in body or b'"status":"cancelled"' in body:
        return True
    return (
        b'"stop_reason":null' in body
        and b'"type":"message_start"' not in body
        and (b'"type":"message_delta"' in body or b'"type":"message",' in body)
    )
