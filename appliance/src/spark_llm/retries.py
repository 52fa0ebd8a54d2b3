"""When a profile that failed may be loaded again: one account for each, which outlives the keepers that come and go."""

import time
from collections import defaultdict
from math import ceil

from spark_llm import policy
from spark_llm.config import Settings
from spark_llm.reply import Reply


def rules_of(settings: Settings) -> policy.Rules:
    """The restart policy as configured."""
    engine = settings.engine
    return policy.Rules(
        freeze_timeout_s=engine.freeze_timeout_s,
        restart_budget=engine.restart_budget,
        restart_window_s=engine.restart_window_s,
    )


class Retries:
    """The failures of the profiles beside the first, by name."""

    def __init__(self, rules: policy.Rules) -> None:
        self._rules = rules
        self._failures: defaultdict[str, list[policy.Failure]] = defaultdict(list)

    def account(self, name: str) -> list[policy.Failure]:
        """The failures of the profile ``name``, oldest first; its keeper adds to them."""
        return self._failures[name]

    def refuse_too_soon(self, name: str, why: str = "") -> None:
        """Refuse a load for which it is too soon after the last failures.

        Args:
            name: of the profile.
            why: what its last keeper says.

        Raises:
            Reply: 503 with the time until the next try.
        """
        failures, now = self._failures[name], time.monotonic()
        wait = policy.next_try(failures, now, self._rules) - now
        if wait > 0:
            raise Reply(
                503,
                failures[-1].reason,
                f"{name} failed and is not loaded again yet" + (f": {why}" if why else ""),
                retry_after_s=ceil(wait),
            )
