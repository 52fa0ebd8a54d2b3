"""The command line's side of the API, against the service and against whatever else may hold its port."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from spark_llm import client
from spark_llm.commands import service as commands
from spark_llm.config import Gateway, Settings
from spark_llm.errors import SparkLlmError, TryAgainError
from spark_llm.reason import Reason

from tests.appliance.service import stub_service


@contextmanager
def program(answer: bytes) -> Iterator[tuple[Settings, list[bytes]]]:
    """A program that answers every connection with the same bytes: settings that lead to it, and what it was sent."""
    heard: list[bytes] = []

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                if not (request := connection.recv(65536)):
                    return  # the end of the test
                heard.append(request)
                with suppress(OSError):
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(
                        65536
                    ):  # closing on unread bytes would take back the answer
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Settings(gateway=Gateway(port=port)), heard
        finally:
            with closing(socket.create_connection(("127.0.0.1", port))):
                pass
            thread.join()


def answer(status: str, body: object, kind: str = "application/json") -> bytes:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (
        status.encode(),
        kind.encode(),
        len(data),
        data,
    )


def refusal(status: str, reason: Reason) -> bytes:
    return answer(status, {"error": {"message": "no", "type": "x", "param": None, "code": reason}})


OTHERS = {
    "vLLM without us": answer("404 Not Found", {"detail": "Not Found"}),
    "an error in one word": answer("404 Not Found", {"error": "not found"}),
    "an error with another's code": answer("400 Bad Request", {"error": {"code": 400}}),
    "other JSON": answer("200 OK", {"ok": True}),
    "a list": answer("200 OK", []),
    "a page": answer("404 Not Found", "<html>", "text/html"),
    "ssh": b"SSH-2.0-OpenSSH_9\r\n",
    "half an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}",
}
ASKED: dict[str, Callable[[Settings], object]] = {
    "status": client.status,
    "wait": lambda settings: client.wait_ready(settings, 30),
    "switch": lambda settings: client.ask(settings, "/api/v1/switch", "switch", {"profile": "x"}),
    "wait for a switch": lambda settings: client.wait_switched(settings, print),
}


@pytest.mark.parametrize("sent", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_another_program_is_told_at_once(sent: bytes, asked: Callable[[Settings], object]) -> None:
    """Whatever else uses the port is named as such, neither waited for nor taken for the service."""
    with (
        program(sent) as (settings, _),
        pytest.raises(SparkLlmError, match="is not spark-llm") as no,
    ):
        asked(settings)
    assert no.value.reason is Reason.PORT_IN_USE
    assert "gateway.port" in no.value.hint


def test_port_that_only_closes_may_be_the_services_yet() -> None:
    """A forwarded port closes connections until the service behind it listens: that is waited for."""
    with program(b"") as (settings, _), pytest.raises(TryAgainError, match="no service answers"):
        client.wait_ready(settings, 0)


def test_key_goes_to_the_service_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment is not asked, and so never sees the API key; nor does a redirect's target."""
    monkeypatch.setenv("SPARK_LLM_API_KEY", "secret")
    with program(b"") as (proxy, overheard):
        url = f"http://127.0.0.1:{proxy.gateway.port}"
        monkeypatch.setenv("http_proxy", url)
        moved = f"HTTP/1.1 302 Found\r\nLocation: {url}/\r\nContent-Length: 0\r\n\r\n"
        with program(answer("200 OK", {"ready": True})) as (settings, heard):
            assert client.ask(settings, "/readyz", "ready") == {"ready": True}
        with program(moved.encode()) as (settings, _), pytest.raises(SparkLlmError):
            client.ask(settings, "/readyz", "ready")
    assert b"Authorization: Bearer secret" in heard[0]
    assert not overheard


def test_key_is_never_sent_in_clear_to_a_service_with_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TLS is configured, nothing of a request goes out before the handshake."""
    monkeypatch.setenv("SPARK_LLM_API_KEY", "sk-spark-secret")
    with program(answer("200 OK", {"state": "ready"})) as (settings, heard):
        gateway = settings.gateway.model_copy(update={"tls_certificate": "cert.pem"})
        with pytest.raises(SparkLlmError):
            client.ask(Settings(gateway=gateway), "/api/v1/status", "state")
    assert heard
    assert all(sent[0] == 0x16 and b"secret" not in sent for sent in heard)  # ClientHello


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_missing_key_says_what_to_do(asked: Callable[[Settings], object]) -> None:
    """Where the service wants a key, the error names the variable that it is taken from."""
    sent = refusal("401 Unauthorized", Reason.UNAUTHORIZED)
    with program(sent) as (settings, _), pytest.raises(SparkLlmError) as caught:
        asked(settings)
    assert caught.value.reason is Reason.UNAUTHORIZED
    assert "SPARK_LLM_API_KEY" in caught.value.hint


@pytest.mark.parametrize(("status", "code"), [("400 Bad Request", 2), ("409 Conflict", 1)])
def test_services_own_error_is_passed_on(status: str, code: int) -> None:
    """An error of the service keeps its sentence and its reason; a wrong request is a wrong use of the command."""
    with (
        program(refusal(status, Reason.UNKNOWN_PROFILE)) as (settings, _),
        pytest.raises(SparkLlmError, match=r"^no$") as caught,
    ):
        client.ask(settings, "/api/v1/switch", "switch", {"profile": "x"})
    assert (caught.value.reason, caught.value.exit_code) == (Reason.UNKNOWN_PROFILE, code)


def test_switch_that_a_restart_cut_off_is_told() -> None:
    """A service that was started anew knows of no switch; who waits for one is told so."""
    with (
        program(answer("200 OK", {"switch": None})) as (settings, _),
        pytest.raises(SparkLlmError, match="started anew"),
    ):
        client.wait_switched(settings, print)


def test_watching_outlasts_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """``status --watch`` shows that the service cannot be reached, and goes on until it can."""
    looks: list[Callable[[], tuple[int, dict[str, Any]]]] = []
    monkeypatch.setattr("spark_llm.status_view.show_until_interrupted", looks.append)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("SPARK_LLM_GATEWAY__PORT", str(listener.getsockname()[1]))
    commands.status(watch=True)
    (look,) = looks
    code, shown = look()
    assert code == 503
    assert "no service answers" in shown["error"]["message"]
    monkeypatch.setattr(client, "status", lambda _: {"state": "ready"})
    assert look() == (200, {"state": "ready"})


def test_failure_after_ready_is_explained(short_path: Path) -> None:
    """``wait --ready`` on a service that was ready and then failed says why and what to do, without an API key."""
    with stub_service(short_path, "crash-later", SPARK_LLM_ENGINE__RESTART_BUDGET="0") as running:
        running.listening().wait_state("failed")
        settings = Settings(gateway=Gateway(port=running.port))
        with pytest.raises(SparkLlmError, match="the engine exited") as caught:
            client.wait_ready(settings, 0)
    assert caught.value.reason is Reason.RESTART_BUDGET
    assert "read the journal" in caught.value.hint
