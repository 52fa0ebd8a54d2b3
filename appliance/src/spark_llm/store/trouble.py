"""What the hub library's errors mean for the user. Imported by the process that talks to the hub alone."""

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from spark_llm.errors import SparkLlmError
from spark_llm.reason import Reason

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How Rust words an errno; hf_xet's exceptions have it in their text alone."""
_RETRIED_STATUS = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Trouble:
    """What went wrong, in the appliance's words.

    Attributes:
        reason: the cause.
        message: one sentence without secrets.
        hint: what to do.
        retry: whether the same request may succeed later.
        wait_s: how long the hub asks to wait, in seconds; 0 where it does not say.
    """

    reason: str
    message: str
    hint: str = ""
    retry: bool = False
    wait_s: float = 0.0


def describe(error: BaseException, model: str, endpoint: str, *, authenticated: bool) -> Trouble:  # noqa: PLR0911  one return a cause
    """What ``error`` of the library means for the user."""
    page = f"{endpoint}/{model}"
    if isinstance(error, SparkLlmError):
        return Trouble(error.reason, error.message, error.hint)
    if isinstance(error, HfHubHTTPError):
        return _describe_http(error, model, page, authenticated=authenticated)
    if xet := _OS_ERROR.search(str(error)):
        return _describe_xet(int(xet[1]), error, model)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Trouble(Reason.NO_DISK, f"the disk filled up while {model} was fetched", _FREE_SPACE)
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return Trouble(
            Reason.UNWRITABLE_DIRECTORY,
            f"cannot write {error.filename}: {error.strerror}",
            "`spark-llm doctor` says more.",
        )
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.InvalidURL):
        return Trouble(
            Reason.NETWORK, f"{endpoint} cannot be reached: {error}", _CHECK_NETWORK, retry=True
        )
    if isinstance(error, httpx2.TimeoutException):
        return Trouble(Reason.STALLED, f"{endpoint} went silent", _CHECK_NETWORK, retry=True)
    if isinstance(error, httpx2.HTTPError):
        message = f"the connection to {endpoint} broke off: {error}"
        return Trouble(Reason.NETWORK, message, _CHECK_NETWORK, retry=True)
    if isinstance(error, json.JSONDecodeError):
        return Trouble(Reason.NETWORK, f"{endpoint} does not answer like a hub", _CHECK_NETWORK)
    return _broken_off(error, model)


def _describe_xet(number: int, error: BaseException, model: str) -> Trouble:
    """An error of the Xet library. Each is worth another try, which goes without Xet and what it alone writes."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        message = f"the disk filled up while Xet fetched {model}"
        return Trouble(Reason.NO_DISK, message, _FREE_SPACE, retry=True)
    if number in (errno.EROFS, errno.EACCES):
        return Trouble(
            Reason.UNWRITABLE_DIRECTORY,
            f"Xet cannot write: {os.strerror(number)}",
            "Set HF_HOME to a folder that this user may write.",
            retry=True,
        )
    return _broken_off(error, model)


def _broken_off(error: BaseException, model: str) -> Trouble:
    return Trouble(
        Reason.NETWORK,
        f"the transfer of {model} broke off: {type(error).__name__}: {error}",
        _CHECK_NETWORK,
        retry=True,
    )


_FREE_SPACE = "Free space with `spark-llm rm` or `spark-llm cache prune`, then pull again: finished files are kept."
_CHECK_NETWORK = "Check the network and HF_ENDPOINT, then pull again: finished files are kept."


def _describe_http(  # noqa: PLR0911  one return a cause
    error: HfHubHTTPError, model: str, page: str, *, authenticated: bool
) -> Trouble:
    status = error.response.status_code
    accept = f"Accept the licence at {page} with the account of your token"
    missing_token = (
        "" if authenticated else "; then give the token: `token_file` of [store], or HF_TOKEN"
    )
    if urlsplit(str(error.response.url))[:2] != urlsplit(page)[:2]:
        # the CDN: a signed address that ran out during a long transfer answers 403; the next try gets a fresh one
        return Trouble(
            Reason.NETWORK,
            f"the hub's file server answers {status}",
            _CHECK_NETWORK,
            retry=True,
            wait_s=_retry_after(error.response.headers),
        )
    if isinstance(error, GatedRepoError) or status == httpx2.codes.FORBIDDEN:
        return Trouble(
            Reason.GATED,
            f"{model} is gated and this account has no access",
            f"{accept}{missing_token}.",
        )
    if isinstance(error, RevisionNotFoundError):
        return Trouble(
            Reason.NOT_FOUND, f"{model} has no such revision", f"{page}/commits lists them."
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return Trouble(
            Reason.NOT_FOUND,
            f"a file of {model} is gone from the hub",
            "Pull again to get the new commit.",
        )
    if isinstance(error, DisabledRepoError):
        return Trouble(Reason.NOT_FOUND, f"the hub has disabled {model}", f"See {page}.")
    if isinstance(error, RepositoryNotFoundError) and not authenticated:
        return Trouble(
            Reason.NOT_FOUND, f"the hub has no public model {model}",
            "Check the name. If it is private, give the token of an account that may read it: "
            "`token_file` of [store], or HF_TOKEN.",
        )  # fmt: skip
    if status == httpx2.codes.UNAUTHORIZED:
        return Trouble(
            Reason.GATED, f"the hub refuses the token for {model}", f"Renew the token. {accept}."
        )
    if isinstance(error, RepositoryNotFoundError):
        return Trouble(
            Reason.NOT_FOUND, f"the hub has no model {model} for this account", "Check the name."
        )
    if status == httpx2.codes.NOT_FOUND:
        return Trouble(
            Reason.NOT_FOUND, f"the hub does not know {model} or a file of it", "Check the name."
        )
    wait = _retry_after(error.response.headers)
    return Trouble(
        Reason.NETWORK, f"the hub answers {status} for {model}", _CHECK_NETWORK,
        retry=status in _RETRIED_STATUS, wait_s=wait,
    )  # fmt: skip


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds the hub asks to wait (RFC 9110, 10.2.3; the date form is left to the back-off)."""
    try:
        return max(0.0, float(headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
