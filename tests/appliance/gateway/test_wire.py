import json

import pytest
from spark_llm.gateway.wire import aborted, aborted_in, error_body, error_event
from spark_llm.reason import Reason

START = b'data: {"type":"message_start","message":{"type":"message","stop_reason":null}}\n\n'
TOOL = b'{"type":"tool_use","id":"t","name":"f","input":{"status":"cancelled","finish_reason":"abort"}}'


@pytest.mark.parametrize(
    ("body", "is_aborted"),
    [
        (b'{"choices":[{"finish_reason":"abort"}]}', True),
        (b'{"choices":[{"finish_reason":"stop"}]}', False),
        (rb'{"choices":[{"message":{"content":"\"finish_reason\":\"abort\""}}]}', False),
        (b'{"choices":[{"finish_reason":"stop"}],"metadata":{"finish_reason":"abort"}}', False),
        # vLLM leaves null values out (anthropic/api_router.py, exclude_none)
        (b'{"type":"message","content":[{"type":"text","text":""}]}', True),
        (b'{"type":"message","content":[],"stop_reason":null}', True),
        (b'{"type":"message","content":[],"stop_reason":"end_turn"}', False),
        (b'{"type":"message","content":[' + TOOL + b'],"stop_reason":"tool_use"}', False),
        (b'{"object":"response","status":"cancelled","output":[]}', True),
        (b'{"object":"response","status":"completed","output":[]}', False),
        (b'{"object":"response","status":"completed","metadata":{"status":"cancelled"}}', False),
        (b'{"object":"list","data":[{"object":"message"}]}', False),
        (b'not "abort" JSON', False),
        (b'["abort"]', False),
    ],
)
def test_aborted_answers_are_told_from_finished_ones(body: bytes, is_aborted: bool) -> None:
    """In each API's shape an aborted answer is known, and the same words in a text, tool call or label are not one."""
    assert aborted(body) is is_aborted


@pytest.mark.parametrize(
    ("events", "is_aborted"),
    [
        (b'data: {"choices":[{"delta":{},"finish_reason":"abort"}]}\n\ndata: [DONE]\n\n', True),
        (b'data: {"choices":[{"delta":{"content":"abort"},"finish_reason":null}]}\n\n', False),
        (START, False),
        (b'data: {"type":"message_delta","delta":{"stop_reason":null}}\n\n', True),
        (START + b'data: {"type":"message_delta","delta":{"stop_reason":null}}\n\n', True),
        (START + b'data: {"type":"message_delta","delta":{"stop_reason":"max_tokens"}}\n\n', False),
        (b'data: {"type":"response.completed","response":{"status":"cancelled"}}\n\n', True),
        (b'data: {"type":"response.completed","response":{"status":"completed"}}\n\n', False),
        (
            b'data: {"type":"response.output_text.delta","delta":"x","status":"cancelled"}\n\n',
            False,
        ),
    ],
)
def test_aborted_streams_are_told_from_finished_ones(events: bytes, is_aborted: bool) -> None:
    """Each event of a piece is judged by itself, so one beside it hides nothing."""
    assert aborted_in(events) is is_aborted


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
