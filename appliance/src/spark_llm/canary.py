"""Ready means correct tokens, not an open port: the requests that prove it, and their judge. Pure.

NVFP4 paths on this GPU were silently wrong in several engine releases (vllm#53014, cutlass#3096,
vllm#53836), and a wrong answer looks as healthy as a right one to every other check.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spark_llm.profile import Canary, Profile

PATH = "/v1/chat/completions"
_STREAMS = 2
"""Sent at once: two requests deadlocked an engine that answered one (vllm#41725)."""
_LEAST, _ROUNDING = -9000.0, 1e-3
"""A greedy token's log probability lies between: vLLM clips minus infinity to -9999, and NaN compares false."""
_CITY = "Oslo"
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True)
class Question:
    """One request to send to the engine. Attributes: body: JSON for :data:`PATH`; tool: a tool call is expected."""

    body: dict[str, Any]
    tool: bool = False


def questions(profile: Profile) -> tuple[Question, ...]:
    """What to ask, all at once."""
    canary = profile.canary
    greedy = {
        "model": "default",
        "temperature": 0,
        "seed": 0,
        "stream": True,
    }
    ask = {
        **greedy,
        "messages": [{"role": "user", "content": canary.prompt}],
        "max_tokens": canary.max_tokens,
        "logprobs": True,
    }
    asked = [Question(ask)] * _STREAMS
    if canary.tool_call:
        call = {
            **greedy,
            "messages": [
                {"role": "user", "content": f"Use the tool: what is the weather in {_CITY} now?"}
            ],
            "max_tokens": 512,
            "tools": [_TOOL],
            "tool_choice": "auto",
            "stream": False,  # a call comes in pieces of JSON, which say no more than the whole
        }
        asked.append(Question(call, tool=True))
    return tuple(asked)


def read(status: int, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a reply, as if it had not been streamed; an event that tells of an error makes it 500.

    Args:
        status: HTTP status; 200 if the engine failed only in the middle of a stream.
        body: server-sent events, or JSON.
    """
    lines = [line[6:] for line in body.splitlines() if line.startswith(b"data: {")]
    if not lines:
        return status, _json(body)
    message: dict[str, str] = {}
    tokens: list[Any] = []
    finish = None
    for event in map(_json, lines):
        if "error" in event:
            return 500, event
        for choice in event.get("choices") or ():
            for name, part in choice["delta"].items():
                if isinstance(part, str):
                    message[name] = message.get(name, "") + part
            tokens += (choice.get("logprobs") or {}).get("content") or ()
            finish = choice.get("finish_reason") or finish
    choice = {"message": message, "logprobs": {"content": tokens}, "finish_reason": finish}
    return status, {"choices": [choice]}


def judge(profile: Profile, asked: Question, status: int, answer: Mapping[str, Any]) -> str:
    """What is wrong with ``answer``; empty if nothing is.

    Args:
        profile: the expectation.
        asked: the question.
        status: HTTP status.
        answer: parsed JSON of the reply.
    """
    if status != 200:  # noqa: PLR2004
        return f"the engine answered {status}: {json.dumps(answer)[:300]}"
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        finish = choice.get("finish_reason")
        text = _text(message)
    except (KeyError, IndexError, TypeError, AttributeError):
        return f"no answer in {json.dumps(answer)[:300]}"
    if finish not in {"stop", "length", "tool_calls"}:
        return f"the answer ended with {finish!r}"
    if asked.tool:
        return _judge_call(message.get("tool_calls") or [])
    return _judge_logprobs(choice.get("logprobs")) or _judge_text(profile.canary, text)


def _json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(message: Mapping[str, Any]) -> str:
    """Thoughts and answer: a reasoning model may spend all its tokens on the former."""
    thoughts = message.get("reasoning") or message.get("reasoning_content") or ""
    return f"{thoughts}\n{message.get('content') or ''}".strip("\n")


def _judge_text(canary: Canary, text: str) -> str:
    if canary.text:
        return "" if text == canary.text else f"expected {canary.text!r}, got {text[:200]!r}"
    if not canary.pattern:
        return "" if text else "an empty answer"
    if what := garbage(text):
        return f"{what}: {text[:200]!r}"
    if not re.search(canary.pattern, text):
        return f"nothing in {text[:200]!r} matches {canary.pattern!r}"
    return ""


def garbage(text: str) -> str:
    """Kind of garbage that broken kernels produce; empty for text that could be an answer."""
    if not text.strip():
        return "an empty answer"
    if re.search(r"(.)\1{19}", text.replace(" ", "").replace("\n", "")):
        return "one character over and over"
    if text.count("\ufffd") * 10 > len(text):
        return "broken characters"
    words = text.split()
    if len(words) >= 12 and len(set(words)) * 5 <= len(words):  # noqa: PLR2004
        return "the same few words over and over"
    return ""


def _judge_logprobs(logprobs: Any) -> str:  # noqa: ANN401  parsed JSON
    tokens: Sequence[Any] = (logprobs or {}).get("content") or []
    for token in tokens:
        value = token.get("logprob")
        if not isinstance(value, int | float) or not _LEAST < value <= _ROUNDING:
            return f"the probability of token {token.get('token')!r} is {value!r}"
    return ""


def _judge_call(calls: Sequence[Mapping[str, Any]]) -> str:
    if not calls:
        return "the tool was not called"
    function = calls[0].get("function", {})
    try:
        arguments = json.loads(function.get("arguments", ""))
    except ValueError:
        return f"the tool call's arguments are no JSON: {function.get('arguments')!r}"
    city = arguments.get("city") if isinstance(arguments, dict) else None
    right = function.get("name") == "get_weather" and _CITY in str(city)
    return "" if right else f"the wrong call: {function!r}"
