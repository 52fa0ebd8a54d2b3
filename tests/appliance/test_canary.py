"""The canary's judge: what passes as a right answer and what does not."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spark_llm.canary import Question, garbage, judge, questions, read
from spark_llm.profile import Canary, Profile, load_profile, shipped_folder

PROFILE = load_profile("gpt-oss-20b", (shipped_folder(),))
TEXT, TOOL = questions(PROFILE)[0], questions(PROFILE)[-1]


def answer(content: str | None, **message: Any) -> dict[str, Any]:  # noqa: ANN401  JSON
    return {"choices": [{"finish_reason": "stop", "message": {"content": content, **message}}]}


def with_canary(**canary: Any) -> Profile:  # noqa: ANN401  any field
    return PROFILE.model_copy(update={"canary": Canary(**canary)})


def test_questions() -> None:
    """Two equal greedy streams go out together, and a tool call where the profile wants one."""
    first, second, tool = questions(PROFILE)
    assert first == second
    assert first.body["stream"] is True
    assert tool.body["stream"] is False
    assert first.body["temperature"] == 0
    assert tool.tool
    assert tool.body["tools"]
    assert len(questions(with_canary())) == 2


def streamed(*choices: dict[str, Any]) -> bytes:
    """A stream as vLLM sends it, with a choice in each event."""
    events = [b"data: " + json.dumps({"choices": [choice]}).encode() for choice in choices]
    return b"\n\n".join((*events, b'data: {"choices": [], "usage": {}}', b"data: [DONE]", b""))


def test_stream_is_read_as_a_whole_answer() -> None:
    """Pieces of thoughts, text and probabilities are put together, and the end is the last one named."""
    token = {"token": "Par", "logprob": -0.1}
    body = streamed(
        {"delta": {"role": "assistant", "content": ""}, "finish_reason": None},
        {"delta": {"reasoning": "The "}, "logprobs": None},
        {"delta": {"reasoning": "capital"}},
        {"delta": {"content": "Par"}, "logprobs": {"content": [token]}},
        {"delta": {"content": "is"}, "logprobs": {"content": [token]}, "finish_reason": "stop"},
    )
    message = {"role": "assistant", "content": "Paris", "reasoning": "The capital"}
    choice = {"message": message, "logprobs": {"content": [token] * 2}, "finish_reason": "stop"}
    assert read(200, body) == (200, {"choices": [choice]})
    assert judge(PROFILE, TEXT, *read(200, body)) == ""


def test_stream_that_fails_in_the_middle_is_an_error() -> None:
    """An engine whose core dies says so in an event of a stream that began with 200; a stream may also just end."""
    half = streamed({"delta": {"content": "Paris"}})
    assert read(200, half + b'data: {"error": {"message": "EngineCore died"}}\n\n')[0] == 500
    assert "ended with None" in judge(PROFILE, TEXT, *read(200, half))


def test_reply_that_is_no_stream() -> None:
    """A refusal comes as JSON, with its status, or as anything."""
    assert read(400, b'{"error": {"code": 400}}') == (400, {"error": {"code": 400}})
    assert read(502, b"<html>") == (502, {})


PASS = [
    answer("Paris"),
    answer(None, reasoning="The capital of France is Paris."),
    answer("It is Paris.", reasoning_content="hm"),
]
FAIL = [
    ("wrong answer", 200, answer("Lyon"), "matches 'Paris'"),
    ("empty", 200, answer(""), "empty"),
    ("error", 500, {"error": {"message": "boom"}}, "answered 500"),
    ("no choices", 200, {}, "no answer"),
    (
        "aborted",
        200,
        {"choices": [{"finish_reason": "abort", "message": {"content": "Paris"}}]},
        "abort",
    ),
    ("exclamation marks", 200, answer("Paris" + "!" * 40), "one character"),
    ("a loop", 200, answer("Paris is " * 30), "same few words"),
    ("broken characters", 200, answer("Paris \ufffd\ufffd\ufffd"), "broken"),
]


@pytest.mark.parametrize("given_answer", PASS)
def test_right_answer_passes(given_answer: dict[str, Any]) -> None:
    """The pattern may be met in the answer or in the thoughts."""
    assert judge(PROFILE, TEXT, 200, given_answer) == ""


@pytest.mark.parametrize(
    ("status", "given_answer", "says"), [row[1:] for row in FAIL], ids=[row[0] for row in FAIL]
)
def test_wrong_answer_fails(status: int, given_answer: dict[str, Any], says: str) -> None:
    """Each way to be wrong is named."""
    assert says in judge(PROFILE, TEXT, status, given_answer)


@pytest.mark.parametrize("value", [math.nan, math.inf, -9999.0, 0.5, None, "x"])
def test_impossible_probability_fails(value: Any) -> None:  # noqa: ANN401  JSON
    """A NaN, an infinity or a probability above one betrays broken kernels behind a right answer."""
    given_answer = answer("Paris")
    given_answer["choices"][0]["logprobs"] = {"content": [{"token": "Paris", "logprob": value}]}
    assert "probability" in judge(PROFILE, TEXT, 200, given_answer)


def test_sound_probabilities_pass() -> None:
    """Log probabilities up to zero are fine."""
    given_answer = answer("Paris")
    given_answer["choices"][0]["logprobs"] = {"content": [{"token": "Paris", "logprob": -0.01}]}
    assert judge(PROFILE, TEXT, 200, given_answer) == ""


def test_pinned_text_is_compared_exactly() -> None:
    """A pinned build has to give the pinned text, to the character."""
    pinned = with_canary(text="abc")
    assert judge(pinned, TEXT, 200, answer("abc")) == ""
    assert "expected 'abc'" in judge(pinned, TEXT, 200, answer("abc "))


@pytest.mark.parametrize("name", ["demo", "demo-gpu"])
def test_demo_has_to_say_its_own_noise(name: str) -> None:
    """The demo's random weights give one text, whichever way its tie of two tokens falls; other noise is wrong."""
    demo = load_profile(name, (shipped_folder(),))
    for right in (" own it two so been an we with", " own it may can the year no of"):
        assert judge(demo, TEXT, 200, answer(right)) == ""
    for wrong in (" about it two so been an we with", " own it down so", "hello", "!" * 40):
        assert judge(demo, TEXT, 200, answer(wrong))


def test_any_text_is_enough_where_nothing_is_expected() -> None:
    """Without pattern and text any non-empty answer passes."""
    assert judge(with_canary(), TEXT, 200, answer("xx xx xx " * 20)) == ""
    assert judge(with_canary(), TEXT, 200, answer("")) != ""


def call(name: str, arguments: str) -> dict[str, Any]:
    message = {"tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    return {"choices": [{"finish_reason": "tool_calls", "message": message}]}


CALLS = [
    (call("get_weather", json.dumps({"city": "Oslo"})), ""),
    (call("get_weather", json.dumps({"city": "Oslo, Norway"})), ""),
    (call("get_weather", "{Oslo"), "no JSON"),
    (call("get_weather", json.dumps({"city": "Rome"})), "wrong call"),
    (call("other", json.dumps({"city": "Oslo"})), "wrong call"),
    (call("get_weather", json.dumps(["Oslo"])), "wrong call"),
    (answer("I cannot do that."), "not called"),
]


@pytest.mark.parametrize(("given_answer", "says"), CALLS)
def test_tool_call(given_answer: dict[str, Any], says: str) -> None:
    """The right tool has to be called with the right city in valid JSON."""
    verdict = judge(PROFILE, TOOL, 200, given_answer)
    assert says in verdict
    assert bool(says) == bool(verdict)


@given(st.text())
def test_any_text_is_judged(text: str) -> None:
    """No answer makes the judge itself fail."""
    assert isinstance(judge(PROFILE, TEXT, 200, answer(text)), str)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)
    )
)
def test_any_json_is_judged(value: Any) -> None:  # noqa: ANN401  JSON
    """Nor does JSON of any shape."""
    assert judge(PROFILE, Question({}), 200, {"choices": [value]})


@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        "The capital of France is Paris, which lies on the Seine and has two million inhabitants.",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13",
        "----------",
    ],
)
def test_ordinary_text_is_no_garbage(text: str) -> None:
    """Real answers are not taken for garbage."""
    assert garbage(text) == ""
