"""Messages to systemd (sd_notify(3)). Where ``NOTIFY_SOCKET`` is absent, nothing is sent and nothing is imported.

``MAINPID=`` is never sent, and the engine's environment has no ``NOTIFY_SOCKET``: with ``NotifyAccess=main`` nobody but
the controller speaks for the service.
"""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from spark_llm.errors import ConfigError

if TYPE_CHECKING:  # the guard, which is small, sends messages too
    from spark_llm.status import Status

EXTENSION_S = 30.0
"""How much longer systemd shall wait, said again and again while a drain or a stop goes on, in seconds."""
TICK_S = 1.0
_STATUS_LIMIT = 500  # characters: `systemctl status` shows one line


class Notifier:
    """Speaks to the service manager.

    Args:
        send: sends one datagram's text; None makes every method do nothing.
        watchdog_s: ``WatchdogSec=`` in seconds; None without one.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        send: Callable[[str], object] | None = None,
        watchdog_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send or (lambda _: None)
        self._watchdog_s = watchdog_s
        self._clock = clock
        self._fed_at = float("-inf")
        self._extended_at = float("-inf")

    def ready(self) -> None:
        """Start or reload is done."""
        self._send("READY=1")

    def reloading(self) -> None:
        """A reload begins; systemd waits for :meth:`ready`. The clock tells this reload from an earlier one's end."""
        self._send(
            f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
        )

    def stopping(self) -> None:
        """The service ends."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """What `systemctl status` shows."""
        self._send("STATUS=" + " ".join(text.split())[:_STATUS_LIMIT])

    def tick(self, *, ending: bool = False) -> None:
        """Called every :data:`TICK_S`, as long as the controller's loop comes round.

        Feeds the watchdog three times per interval, and asks for more time while the service drains or stops.
        """
        now = self._clock()
        if self._watchdog_s is not None and now - self._fed_at >= self._watchdog_s / 3:
            self._fed_at = now
            self._send("WATCHDOG=1")
        if ending and now - self._extended_at >= EXTENSION_S / 3:
            self._extended_at = now
            self._send(f"EXTEND_TIMEOUT_USEC={int(EXTENSION_S * 1e6)}")


def connect(environ: Mapping[str, str] = os.environ) -> Notifier:
    """The notifier for this process.

    Raises:
        ConfigError: systemd waits for messages, but systemd-python is not installed: the start would time out.
    """
    if not environ.get("NOTIFY_SOCKET"):
        return Notifier()
    try:
        from systemd import daemon  # noqa: PLC0415  an optional extra; only needed here
    except ImportError as error:
        raise ConfigError(
            "systemd waits for messages (NOTIFY_SOCKET), but systemd-python is not installed",
            hint="Install the extra: pip install 'spark-llm[systemd]', or `make systemd` in a checkout.",
        ) from error
    return Notifier(partial(daemon.notify, unset_environment=False), _watchdog(environ))


def _watchdog(environ: Mapping[str, str]) -> float | None:
    """``WATCHDOG_USEC`` in seconds, if it is meant for this process (sd_watchdog_enabled(3))."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    usec = environ.get("WATCHDOG_USEC", "")
    return int(usec) / 1e6 if usec.isdigit() and int(usec) else None


def status_line(now: "Status") -> str:
    """``STATUS=`` for a moment of the appliance: state, percent, phase, and the reason's code where there is one."""
    words = [now.state.value]
    if now.state not in {"ready", "stopped"} and now.percent:
        words.append(f"{now.percent} %")
    if now.reason != "ok":
        words.append(f"[{now.reason}]")
    text = " ".join(words)
    said = [part for part in (now.phase, now.message) if part]
    return f"{text}: {', '.join(said)}" if said else text
