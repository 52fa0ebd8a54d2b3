import json

import pytest
from spark_llm.gateway.wire import aborted, error_body, error_event
from spark_llm.reason import Reason


@pytest.mark.parametrize(
    ("body", "is_aborted"),
    [
        (b'{"choices":[{"finish_reason":"abort"}]}', True),
        (b'data: {"choices":[{"delta":{},"finish_reason":"abort"}]}\n\n', True),
        (b'{"choices":[{"finish_reason":"stop"}]}', False),
        (rb'{"choices":[{"message":{"content":"\"finish_reason\":\"abort\""}}]}', False),
        (b'{"type":"message","content":[],"stop_reason":null}', True),
        (b'{"type":"message","content":[],"stop_reason":"end_turn"}', False),
        (
            b'data: {"type":"message_start","message":{"type":"message","stop_reason":null}}\n\n',
            False,
        ),
        (b'data: {"type":"message_delta","delta":{"stop_reason":null}}\n\n', True),
        (b'data: {"type":"message_delta","delta":{"stop_reason":"max_tokens"}}\n\n', False),
        (b'{"object":"response","status":"cancelled","output":[]}', True),
        (b'{"object":"response","status":"completed","output":[]}', False),
    ],
)
def test_aborted_answers_are_told_from_finished_ones(body: bytes, is_aborted: bool) -> None:
    """In each API's shape, an aborted answer is known, and a model that writes such bytes is not mistaken."""
    assert aborted(body) is is_aborted


def test_shapes() -> None:
    """Errors below /v1/messages are Anthropic-shaped, all others OpenAI-shaped."""
    message = json.loads(error_body("/v1/messages", 429, Reason.QUEUE_FULL, "full"))
    assert message["type"] == "error"
    assert message["error"]["type"] == "rate_limit_error"
    chat = json.loads(error_body("/v1/chat/completions", 429, Reason.QUEUE_FULL, "full"))
    assert chat["error"] == {
        "message": "full",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    assert error_event("/v1/messages", 503, Reason.DRAINING, "x").startswith(
        b"event: error\ndata: "
    )
