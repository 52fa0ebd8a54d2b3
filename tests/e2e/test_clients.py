"""The main job: real client libraries against a real vLLM through the gateway."""

import json
import subprocess
import sys

import anthropic
import openai
import pytest

from tests.appliance.service import Service, fetch

HELLO = "Tell me about the spark"


@pytest.fixture
def client(demo: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{demo.port}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(demo: Service) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=f"http://127.0.0.1:{demo.port}", api_key="none", max_retries=0
    )


def test_models_list_all_names(client: openai.OpenAI) -> None:
    """The list of models holds the profile's name and the alias ``default``."""
    with client:
        assert {"demo", "default"} <= {model.id for model in client.models.list()}


def test_chat(client: openai.OpenAI) -> None:
    """A chat completion has text and counts its tokens."""
    with client:
        answer = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": HELLO}], max_tokens=12
        )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


def test_stream_is_the_same_text(client: openai.OpenAI) -> None:
    """A greedy answer is the same streamed and whole, and comes in one chunk a token."""
    with client:
        whole = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": HELLO}],
            max_tokens=24,
            temperature=0,
        )
        chunks = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": HELLO}],
                max_tokens=24,
                temperature=0,
                stream=True,
            )
        ]
    assert "".join(chunks) == whole.choices[0].message.content
    assert len(chunks) > 20


def test_completions(client: openai.OpenAI) -> None:
    """The completions API answers."""
    with client:
        answer = client.completions.create(model="default", prompt="the", max_tokens=5)
    assert answer.choices[0].text


def test_responses(client: openai.OpenAI) -> None:
    """The responses API answers."""
    with client:
        answer = client.responses.create(model="default", input=HELLO, max_output_tokens=16)
    assert answer.output_text


def test_messages(claude: anthropic.Anthropic) -> None:
    """Anthropic's messages API answers, whole and streamed, with the same greedy text."""
    with claude:
        whole = claude.messages.create(
            model="default",
            max_tokens=12,
            extra_body={"temperature": 0},
            messages=[{"role": "user", "content": HELLO}],
        )
        with claude.messages.stream(
            model="default",
            max_tokens=12,
            extra_body={"temperature": 0},
            messages=[{"role": "user", "content": HELLO}],
        ) as stream:
            text = "".join(stream.text_stream)
    assert whole.content[0].type == "text"
    assert whole.content[0].text == text
    assert whole.stop_reason == "max_tokens"


def test_count_tokens(claude: anthropic.Anthropic) -> None:
    """Anthropic's token count is the prompt's length that the answer reports."""
    with claude:
        count = claude.messages.count_tokens(
            model="default", messages=[{"role": "user", "content": HELLO}]
        )
        answer = claude.messages.create(
            model="default", max_tokens=1, messages=[{"role": "user", "content": HELLO}]
        )
    assert count.input_tokens == answer.usage.input_tokens


def test_unknown_model_is_a_not_found_error(client: openai.OpenAI) -> None:
    """A model that is not served raises the library's NotFoundError."""
    with client, pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-0", messages=[{"role": "user", "content": "x"}])


def test_prompt_beyond_the_context_is_a_bad_request(client: openai.OpenAI) -> None:
    """A prompt longer than the context raises BadRequestError."""
    with client, pytest.raises(openai.BadRequestError):
        client.completions.create(model="default", prompt="the " * 5000, max_tokens=5)


def test_curl_streams(demo: Service) -> None:
    """The README's curl line streams events."""
    done = subprocess.run(
        [
            "curl",
            "-sN",
            f"localhost:{demo.port}/v1/chat/completions",
            "-H",
            "content-type: application/json",
            "-d",
            (
                '{"model": "default", "stream": true, "max_tokens": 4, '
                '"messages": [{"role": "user", "content": "Hello"}]}'
            ),
        ],
        capture_output=True,
        timeout=60,
        check=True,
    )
    events = [line for line in done.stdout.split(b"\n\n") if line]
    assert events[-1] == b"data: [DONE]"
    assert all(json.loads(event.removeprefix(b"data: ")) for event in events[:-1])


def test_engine_only_routes_are_closed(demo: Service) -> None:
    """The engine's own unguarded routes are 404 through the gateway."""
    for path in ("/invocations", "/tokenize", "/version", "/load", "/docs"):
        assert fetch(f"http://127.0.0.1:{demo.port}{path}", b"{}")[0] == 404


def test_metrics_are_one_scrape(demo: Service) -> None:
    """One scrape has the service's own numbers and the engine's."""
    text = demo.get("/metrics")[1]
    assert 'spark_llm_state{state="ready"} 1.0' in text
    assert "vllm:generation_tokens_total" in text


def test_command_line_sees_it(demo: Service) -> None:
    """``spark-llm status --json`` and ``wait --ready`` reach the service."""
    for arguments, expected in ((["status", "--json"], '"ready"'), (["wait", "--ready"], "ready")):
        done = subprocess.run(
            [sys.executable, "-m", "spark_llm.cli", *arguments],
            env={"SPARK_LLM_GATEWAY__PORT": str(demo.port), "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert expected in done.stdout
