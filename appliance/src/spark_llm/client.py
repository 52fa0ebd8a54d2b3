"""The command line's side of the service's own API."""

import contextlib
import http.client
import json
import os
import ssl
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from spark_llm import sockets
from spark_llm.config import Settings
from spark_llm.errors import ConfigError, SparkLlmError, TryAgainError
from spark_llm.reason import Reason

_TIMEOUT_S = 10.0


def ask(settings: Settings, path: str, key: str, body: object = None) -> dict[str, Any]:
    """JSON of a GET, or of a POST of ``body``.

    The API key comes from ``SPARK_LLM_API_KEY``; a command line would show it to every user of the machine. It goes to
    the service alone: neither a proxy nor a redirect is followed.

    Args:
        settings: where the service listens.
        path: what to ask for.
        key: what every answer to it has that is no error; another program's has not.
        body: for JSON; None for a GET.

    Raises:
        TryAgainError: nobody listens there.
        SparkLlmError: the service's own error, or what listens is not spark-llm.
    """
    host, port = _client_host(settings.gateway.host), settings.gateway.port
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def plain() -> http.client.HTTPConnection:
        return http.client.HTTPConnection(host, port, _TIMEOUT_S)

    def encrypted() -> http.client.HTTPConnection:
        return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=_trust(settings))

    try:
        try:
            first = encrypted if settings.gateway.tls_certificate else plain
            code, sent = _exchange(first(), path, body)
        except (http.client.BadStatusLine, ConnectionResetError):
            # What answers there speaks TLS: the credential that says so is readable by the service alone.
            code, sent = _exchange(encrypted(), path, body)
    except (OSError, http.client.HTTPException) as error:
        raise _no_answer(error, place) from error
    answer = _json(sent)
    if key in answer:
        return answer
    raise _refusal(code, answer) or _not_ours(place)


def _exchange(connection: http.client.HTTPConnection, path: str, body: object) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("SPARK_LLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    with contextlib.closing(connection):
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def _trust(settings: Settings) -> ssl.SSLContext:
    """Whom to believe: on loopback whoever listens, as with plain HTTP; elsewhere the usual roots and ours."""
    context = ssl.create_default_context()
    if sockets.is_loopback(_client_host(settings.gateway.host)):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif settings.gateway.tls_certificate:
        context.load_verify_locations(settings.gateway.tls_certificate)
    return context


def _no_answer(error: Exception, place: str) -> SparkLlmError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return SparkLlmError(
            f"the certificate of {place} is not trusted: {error}",
            reason=Reason.UNAUTHORIZED,
            hint="Set gateway.tls_certificate to a file that this user may read.",
        )
    # One that only closes the connection may be a forwarded port, with the service still to come behind it.
    closed = isinstance(error, ssl.SSLEOFError)
    if isinstance(error, OSError) and (closed or not isinstance(error, ssl.SSLError)):
        return TryAgainError(
            f"no service answers at {place}",
            reason=Reason.NOT_READY,
            hint="Start it with `spark-llm serve` or `systemctl start spark-llm`.",
        )
    return _not_ours(place)


def _not_ours(place: str) -> SparkLlmError:
    return SparkLlmError(
        f"what answers at {place} is not spark-llm",
        reason=Reason.PORT_IN_USE,
        hint="Another program uses the port; set gateway.port.",
    )


def _refusal(code: int, answer: dict[str, Any]) -> SparkLlmError | None:
    """The service's own error; None if this is not one."""
    error = answer.get("error")
    if not isinstance(error, dict) or error.get("code") not in set(Reason):
        return None
    kind = ConfigError if code == HTTPStatus.BAD_REQUEST else SparkLlmError
    hint = "Set SPARK_LLM_API_KEY to a key." if code == HTTPStatus.UNAUTHORIZED else ""
    return kind(str(error.get("message")), reason=Reason(error["code"]), hint=hint)


def status(settings: Settings) -> dict[str, Any]:
    """What the service is doing; errors as :func:`ask`."""
    return ask(settings, "/api/v1/status", "restarts_left")


def wait_switched(
    settings: Settings, say: Callable[[str], None], poll_s: float = 0.5
) -> dict[str, Any]:
    """Wait until the last switch is over; returns it. Each new phase is told to ``say``.

    Raises:
        SparkLlmError: the service was started anew meanwhile and knows of no switch; and as :func:`ask`.
    """
    told = ""
    while True:
        switch: dict[str, Any] | None = ask(settings, "/api/v1/switch", "switch")["switch"]
        if switch is None:
            raise SparkLlmError(
                "the service was started anew before the switch was over",
                reason=Reason.ABORTED,
                hint="`spark-llm status` shows what it serves.",
            )
        if switch["outcome"] != "running":
            return switch
        now = status(settings)
        line = f"{now['profile']}: {now['state']}" + (f", {now['phase']}" if now["phase"] else "")
        if line != told:
            say(line)
            told = line
        time.sleep(poll_s)


def wait_ready(settings: Settings, timeout_s: float, poll_s: float = 0.5) -> dict[str, Any]:
    """Wait for ready; returns the last answer of ``/readyz``.

    Raises:
        TryAgainError: not ready within ``timeout_s`` seconds.
        SparkLlmError: it failed or is blocked, and says why; or what listens is not spark-llm.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            body = ask(settings, "/readyz", "ready")
        except TryAgainError:
            if time.monotonic() >= deadline:
                raise
        else:
            if body["ready"]:
                return body
            if body.get("state") in {"failed", "blocked"}:
                raise SparkLlmError(
                    str(body.get("message") or body["state"]),
                    reason=Reason(body["reason"]),
                    hint=str(body.get("hint", "")),
                )
            if time.monotonic() >= deadline:
                raise TryAgainError(
                    f"not ready after {timeout_s:g} s; it is {body.get('state')}",
                    reason=Reason.NOT_READY,
                    hint="`spark-llm status --watch` shows how far it is.",
                )
        time.sleep(poll_s)


def _client_host(host: str) -> str:
    if host in {"0.0.0.0", "::"}:  # noqa: S104  where a server listens everywhere, a client asks loopback
        return "127.0.0.1"
    return host


def _json(body: bytes) -> dict[str, Any]:
    """An object; an empty one for whatever else it is."""
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
