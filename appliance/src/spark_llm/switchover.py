"""A change of the primary, from its announcement to its outcome. Pure."""

from dataclasses import dataclass, replace

from spark_llm.profile import Profile
from spark_llm.reason import Reason
from spark_llm.status import Status

_RUNNING = "running"


@dataclass(frozen=True)
class Switch:
    """A change of the primary.

    Attributes:
        before: profile that was served.
        after: profile that shall be.
        outcome: ``running``; ``done``; ``returned`` to the one before; ``failed``, neither serves.
        reason: why it was not done.
        message: the same as a sentence.
        hint: what to do.
    """

    before: str
    after: str
    outcome: str = _RUNNING
    reason: Reason = Reason.OK
    message: str = ""
    hint: str = ""

    @property
    def running(self) -> bool:
        """Whether it is under way."""
        return self.outcome == _RUNNING

    def touches(self, name: str) -> bool:
        """Whether it is under way and may start or stop the profile ``name``."""
        return self.running and name in {self.before, self.after}

    def over(self, failed: Status | None, back: Status | None = None) -> "Switch":
        """How it ended.

        Args:
            failed: status of :attr:`after`, if it was not proven.
            back: status of :attr:`before`, if that was needed and is not proven either.
        """
        if failed is None:
            return replace(self, outcome="done")
        serving = "serves again" if back is None else "does not start again either"
        return replace(
            self,
            outcome="returned" if back is None else "failed",
            reason=failed.reason,
            message=f"{self.after} failed: {failed.message}; {self.before} {serving}",
            hint=failed.hint,
        )

    def broken_off(self, reason: Reason, message: str, hint: str = "") -> "Switch":
        """It ended before either was proven."""
        return replace(self, outcome="failed", reason=reason, message=message, hint=hint)


def steps(before: Profile, after: Profile, *, running: int, drain_timeout_s: float) -> list[str]:
    """What a switch does, in words.

    Args:
        before: what is served.
        after: what shall be.
        running: requests at the engine now.
        drain_timeout_s: longest time for them to end, in seconds.
    """
    return [
        f"drain {before.name} ({running} requests run, at most {drain_timeout_s:g} s)",
        "stop its engine and wait until its memory is back",
        f"start {after.name} ({after.model}) and ask its canary",
        f"return to {before.name} if that fails",
    ]
