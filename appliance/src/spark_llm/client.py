"""The command line's side of the service's own API."""

import http.client
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from spark_llm import sockets
from spark_llm.config import Settings
from spark_llm.errors import ConfigError, SparkLlmError, TryAgainError
from spark_llm.reason import Reason

_TIMEOUT_S = 10.0


def ask(settings: Settings, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a GET, or of a POST of ``body``.

    The API key comes from ``SPARK_LLM_API_KEY``; a command line would show it to every user of the machine.

    Raises:
        TryAgainError: nobody listens there.
        SparkLlmError: what listens is not spark-llm.
    """
    place = f"{_client_host(settings.gateway.host)}:{settings.gateway.port}"
    try:
        try:
            return _ask(f"http://{place}{path}", body, None)
        except (http.client.BadStatusLine, ConnectionResetError):
            # What answers there speaks TLS: the credential that says so is readable by the service alone.
            return _ask(f"https://{place}{path}", body, _trust(settings))
    except OSError as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            raise SparkLlmError(
                f"the certificate of {place} is not trusted: {error}",
                reason=Reason.UNAUTHORIZED,
                hint="Set gateway.tls_certificate to a file that this user may read.",
            ) from error
        raise TryAgainError(
            f"no service answers at {place}",
            reason=Reason.NOT_READY,
            hint="Start it with `spark-llm serve` or `systemctl start spark-llm`.",
        ) from error


def _ask(url: str, body: object, trust: ssl.SSLContext | None) -> tuple[int, dict[str, Any]]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310  http or https, see ask
    if key := os.environ.get("SPARK_LLM_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=trust) as answer:  # noqa: S310
            return answer.status, _json(answer.read(), url)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _json(error.read(), url)


def _trust(settings: Settings) -> ssl.SSLContext:
    """Whom to believe: on loopback whoever listens, as with plain HTTP; elsewhere the usual roots and ours."""
    context = ssl.create_default_context()
    if sockets.is_loopback(_client_host(settings.gateway.host).strip("[]")):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif settings.gateway.tls_certificate:
        context.load_verify_locations(settings.gateway.tls_certificate)
    return context


def tell(settings: Settings, path: str, body: object) -> dict[str, Any]:
    """JSON of a POST that went well.

    Raises:
        SparkLlmError: the service's own error; and as :func:`ask`.
    """
    code, answer = ask(settings, path, body)
    if code >= HTTPStatus.BAD_REQUEST:
        error = answer.get("error", {})
        kind = ConfigError if code == HTTPStatus.BAD_REQUEST else SparkLlmError
        raise kind(str(error.get("message", answer)), reason=Reason(error.get("code", "internal")))
    return answer


def wait_switched(
    settings: Settings, say: Callable[[str], None], poll_s: float = 0.5
) -> dict[str, Any]:
    """Wait until the last switch is over; returns it. Each new phase is told to ``say``."""
    told = ""
    while True:
        _, answer = ask(settings, "/api/v1/switch")
        switch: dict[str, Any] = answer["switch"]
        if switch["outcome"] != "running":
            return switch
        _, now = ask(settings, "/api/v1/status")
        line = f"{now['profile']}: {now['state']}" + (f", {now['phase']}" if now["phase"] else "")
        if line != told:
            say(line)
            told = line
        time.sleep(poll_s)


def wait_ready(settings: Settings, timeout_s: float, poll_s: float = 0.5) -> dict[str, Any]:
    """Wait for ready; returns the last status.

    Raises:
        TryAgainError: not ready within ``timeout_s`` seconds.
        SparkLlmError: it failed or is blocked, and says why.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        body: dict[str, Any] = {}
        try:
            code, body = ask(settings, "/readyz")
        except TryAgainError:
            if time.monotonic() >= deadline:
                raise
        else:
            if code == 200:  # noqa: PLR2004  HTTP
                return body
            if body.get("state") in {"failed", "blocked"}:
                _, status = ask(settings, "/startupz")
                raise SparkLlmError(
                    str(status.get("message") or body["state"]),
                    reason=Reason(body["reason"]),
                    hint=str(status.get("hint", "")),
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
    return f"[{host}]" if ":" in host else host


def _json(body: bytes, url: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise SparkLlmError(
            f"what answers at {url} is not spark-llm",
            reason=Reason.PORT_IN_USE,
            hint="Another program uses the port; set gateway.port.",
        )
    return value
