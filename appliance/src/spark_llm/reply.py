"""An answer that the gateway gives itself, raised from wherever it becomes clear."""

from spark_llm.errors import ConfigError, RefusedError, SparkLlmError, TryAgainError
from spark_llm.reason import Reason

_BY_REASON = {Reason.MODEL_MISSING: 404, Reason.NOT_FOUND: 404, Reason.MODEL_BUSY: 409}
_BY_KIND = {ConfigError: 400, RefusedError: 409, TryAgainError: 503}
_BODY_UNREAD = {408, 413}
_RETRY_AFTER_S = 10


class Reply(Exception):  # noqa: N818  it is an answer, not always an error of ours
    """What to answer.

    Attributes:
        status: of HTTP.
        reason: the code.
        message: one sentence.
        retry_after_s: for ``Retry-After``; None leaves it out.
    """

    def __init__(
        self, status: int, reason: Reason, message: str, *, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        """What the answer's head says besides the status."""
        found = {}
        if self.retry_after_s is not None:
            found["retry-after"] = str(self.retry_after_s)
        if self.status in _BODY_UNREAD:
            found["connection"] = "close"  # the rest of the request's body is not waited for
        return found


def reply_of(error: SparkLlmError) -> Reply:
    """The answer that an error of ours is: by its reason where that says more, else by its kind."""
    by_kind = (status for kind, status in _BY_KIND.items() if isinstance(error, kind))
    status = _BY_REASON.get(error.reason) or next(by_kind, 500)
    message = f"{error.message}. {error.hint}" if error.hint else error.message
    again = _RETRY_AFTER_S if status == 503 else None  # noqa: PLR2004  HTTP
    return Reply(status, error.reason, message, retry_after_s=again)
