"""What can go wrong, as one tree.

::

    SparkLlmError            exit 1   it failed
    ├── ConfigError          exit 2   configuration or usage: the person changes something
    ├── RefusedError         exit 3   asked for something that cannot be: does not fit, no disk, gated
    └── TryAgainError        exit 75  the same call may go through later (EX_TEMPFAIL, sysexits.h)
"""

from spark_llm.reason import Reason


class SparkLlmError(Exception):
    """An error with a cause a program can read and a hint a person can follow.

    Args:
        message: one sentence, what happened.
        reason: the cause.
        hint: one sentence, what to do about it; empty where nothing can be done.
    """

    exit_code = 1

    def __init__(self, message: str, *, reason: Reason, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.hint = hint


class ConfigError(SparkLlmError):
    """Configuration or usage; nothing was started."""

    exit_code = 2

    def __init__(self, message: str, *, reason: Reason = Reason.BAD_CONFIG, hint: str = "") -> None:
        super().__init__(message, reason=reason, hint=hint)


class RefusedError(SparkLlmError):
    """What was asked for cannot be done on this machine or with these rights."""

    exit_code = 3


class TryAgainError(SparkLlmError):
    """A passing condition: busy, not ready yet."""

    exit_code = 75
