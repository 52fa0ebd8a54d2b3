"""SIGHUP: take up what can change under running requests, and name what cannot."""

import logging
import os
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_llm import keys, logs, sockets, tls
from spark_llm.admission import Limits
from spark_llm.config import Settings
from spark_llm.controller import Controller
from spark_llm.errors import ConfigError, SparkLlmError
from spark_llm.folders import Folders
from spark_llm.gateway.app import Gateway
from spark_llm.reason import Reason

LIVE = frozenset(
    {
        "admission.max_queue_per_key",
        "admission.max_running_per_key",
        "gateway.max_running",
        "gateway.max_queue",
        "gateway.queue_timeout_s",
        "gateway.tls_certificate",
        "gateway.tls_key",
        "log.level",
    }
)
"""Settings that a reload applies. API keys, TLS files and the profiles to load on demand are read again besides."""

log = logging.getLogger("spark_llm")


@dataclass(frozen=True)
class Plan:
    """What a reload does.

    Attributes:
        live: keys of settings that change now, sorted.
        restart: keys of settings that differ but need a restart, sorted.
    """

    live: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    def sentence(self) -> str:
        """For a person."""
        applied = f"applied {', '.join(self.live)}" if self.live else "no setting changed"
        wait = f"; a restart is needed for {', '.join(self.restart)}" if self.restart else ""
        return f"reloaded: keys, certificates and profiles read again, {applied}{wait}"


def plan(running: Settings, wanted: Settings) -> Plan:
    """Compare the settings that run with those that are wanted."""
    before, after = _flat(running.model_dump()), _flat(wanted.model_dump())
    changed = sorted(key for key in before if before[key] != after[key])
    return Plan(
        tuple(key for key in changed if key in LIVE),
        tuple(key for key in changed if key not in LIVE),
    )


def applied(running: Settings, wanted: Settings) -> Settings:
    """``running`` with the live keys of ``wanted``."""
    gateway = {
        key.removeprefix("gateway."): getattr(wanted.gateway, key.removeprefix("gateway."))
        for key in LIVE
        if key.startswith("gateway.")
    }
    return running.model_copy(
        update={
            "log": wanted.log,
            "admission": wanted.admission,
            "gateway": running.gateway.model_copy(update=gateway),
        }
    )


def limits(settings: Settings) -> Limits:
    """Admission's limits as configured, before :meth:`Limits.for_engine`."""
    gateway = settings.gateway
    return Limits(
        max_running=gateway.max_running or sys.maxsize,  # Limits.for_engine sets the bound then
        max_queue=gateway.max_queue,
        max_running_per_key=settings.admission.max_running_per_key,
        max_queue_per_key=settings.admission.max_queue_per_key,
        queue_timeout_s=gateway.queue_timeout_s,
    )


def accepted_keys(folders: Folders) -> tuple[keys.Key, ...]:
    """API keys of the state folder and of the systemd credential ``api-keys``, which has the same form.

    Raises:
        ConfigError: one of the two is damaged.
    """
    found = keys.load(folders.keys)
    if credentials := os.environ.get("CREDENTIALS_DIRECTORY"):
        found += keys.load(Path(credentials) / "api-keys")
    return found


def refuse_open_door(
    settings: Settings, hosts: tuple[str, ...], accepted: tuple[keys.Key, ...]
) -> None:
    """Raise when the network could come in without a key.

    Args:
        settings: for ``gateway.insecure``.
        hosts: addresses that are listened on; systemd may have chosen them.
        accepted: API keys.

    Raises:
        ConfigError: not loopback, no keys, not ``insecure``.
    """
    if accepted or settings.gateway.insecure:
        return
    for host in hosts:
        if not sockets.is_loopback(host):
            raise ConfigError(
                f"{host} is reachable from the network and no API key is configured",
                reason=Reason.INSECURE_BIND,
                hint="Make one with `spark-llm keys add NAME`, or pass --insecure.",
            )


class Reloader:
    """Reads everything again and applies it; on an error, all stays as it is.

    Args:
        settings: what runs.
        reread: reads the settings from the same sources as at the start.
        folders: for the keys.
        hosts: addresses that are listened on.
        gateway: takes new keys.
        controller: takes new limits and profiles.
        context: takes a new certificate; None for plain HTTP.
    """

    def __init__(  # noqa: PLR0913, PLR0917  one for each thing that a reload touches
        self,
        settings: Settings,
        reread: Callable[[], Settings],
        folders: Folders,
        hosts: tuple[str, ...],
        gateway: Gateway,
        controller: Controller,
        context: ssl.SSLContext | None,
    ) -> None:
        self.settings = settings
        self._reread = reread
        self._folders = folders
        self._hosts = hosts
        self._gateway = gateway
        self._controller = controller
        self._context = context

    def reload(self) -> str:
        """Do it; returns a sentence that says what changed, or why nothing did."""
        try:
            wanted = self._reread()
            accepted = accepted_keys(self._folders)
            refuse_open_door(wanted, self._hosts, accepted)
            found = tls.files(wanted.gateway, os.environ)
            todo = plan(self.settings, wanted)
            if (found is None) != (self._context is None):
                todo = Plan(todo.live, (*todo.restart, "TLS on or off"))
            elif found is not None and self._context is not None:
                tls.refresh(self._context, found)
        except SparkLlmError as error:
            sentence = f"reload refused, nothing changed: {error.message}"
            log.error("%s. %s", sentence, error.hint)  # noqa: TRY400  for a person, no traceback
            return sentence
        self.settings = applied(self.settings, wanted)
        self._gateway.keys = accepted
        self._controller.set_limits(limits(self.settings))
        self._controller.read_profiles()
        logs.set_level(self.settings.log.level)
        log.warning("%s", todo.sentence()) if todo.restart else log.info("%s", todo.sentence())
        return todo.sentence()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
