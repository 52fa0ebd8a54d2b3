"""An answer that the gateway gives itself, raised from wherever it becomes clear."""

from spark_llm.reason import Reason


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
