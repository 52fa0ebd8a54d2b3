"""The hub token: where it comes from and where it may go.

The processes that ask the hub read it: the fetching one, and the commands ``fit`` and ``doctor``; never the service.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from spark_llm.errors import RefusedError
from spark_llm.reason import Reason

CREDENTIAL = "hub-token"
"""Name of the systemd credential: ``LoadCredential=hub-token:/etc/spark-llm/hub-token``."""


def read_token(token_file: str, environ: Mapping[str, str]) -> str | None:
    """The hub token: systemd credential, then ``token_file``, ``$HF_TOKEN``, then the file of ``hf auth login``.

    Raises:
        RefusedError: a token that is none, or a ``token_file`` that cannot be read.
    """
    _, token = next(token_sources(token_file, environ), ("", ""))
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise RefusedError(
            "the hub token has characters that no token has",
            reason=Reason.GATED,
            hint="Store the token alone, on one line.",
        )
    return token or None


def token_sources(token_file: str, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every place that has a token, with the token, the one that counts first.

    Raises:
        RefusedError: ``token_file`` cannot be read.
    """
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if folder and (Path(folder) / CREDENTIAL).is_file():
        yield f"systemd credential {CREDENTIAL}", _read(Path(folder) / CREDENTIAL)
    if token_file:
        yield token_file, _read(Path(token_file))
    if environ.get("HF_TOKEN"):
        yield "$HF_TOKEN", environ["HF_TOKEN"].strip()
    if (path := login_file(environ)).is_file():
        yield str(path), _read(path)


def login_file(environ: Mapping[str, str]) -> Path:
    """Where ``hf auth login`` leaves its token (huggingface_hub 2.4.0, constants.py)."""
    if environ.get("HF_TOKEN_PATH"):
        return Path(environ["HF_TOKEN_PATH"])
    cache = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/")) / ".cache")
    return Path(environ.get("HF_HOME") or cache / "huggingface") / "token"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise RefusedError(
            f"cannot read the hub token from {path}: {why}",
            reason=Reason.GATED,
            hint="Let this user read the file, or set store.token_file to another one.",
        ) from None


def check_endpoint(endpoint: str, token: str | None) -> None:
    """A token travels over TLS or stays on this machine.

    Raises:
        RefusedError: plain HTTP to another machine, with a token.
    """
    parts = urlsplit(endpoint)
    if (
        token
        and parts.scheme != "https"
        and parts.hostname not in ("127.0.0.1", "::1", "localhost")
    ):
        raise RefusedError(
            f"the hub token is not sent to {endpoint} without TLS",
            reason=Reason.GATED,
            hint="Use an https:// endpoint, or remove the token.",
        )
