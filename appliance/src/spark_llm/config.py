"""Configuration: flag > ``SPARK_LLM_*`` environment > TOML file > default.

Nested keys are spelt with a dot in messages, a table in TOML and two underscores in the environment:
``gateway.port``, ``[gateway] port = 8000``, ``SPARK_LLM_GATEWAY__PORT=8000``.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from spark_llm.errors import ConfigError
from spark_llm.validation import explain, undecodable

DEFAULT_FILE = Path("/etc/spark-llm/config.toml")
ENV_PREFIX = "SPARK_LLM_"
_OTHER_VARIABLES = {"SPARK_LLM_CONFIG", "SPARK_LLM_API_KEY", "SPARK_LLM_NO_NSPAWN"}
"""Variables with our prefix that are no settings: the file to read, the client's key, the tests' switch."""
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gateway(_Section):
    """The front door.

    Attributes:
        host: address to bind; anything but loopback needs API keys, or ``insecure``.
        port: TCP port; 0 takes a free one and prints it.
        insecure: allow a non-loopback address without keys.
        max_body_bytes: largest request body, in bytes.
        max_bodies_bytes: memory for the bodies of all requests that arrive, wait or are answered, in bytes; one that
            finds none is answered 503.
        max_header_bytes: largest request head, in bytes.
        header_timeout_s: time a client has to send its request's head and body, in seconds.
        send_timeout_s: how long a client may take nothing of its answer before its request is aborted, in seconds; as
            nginx's ``send_timeout``.
        keep_alive_s: how long a connection without a request stays open, in seconds; longer than reverse proxies keep
            theirs by default (nginx 60, Traefik 90, Caddy 120), or they send a request into one that is being closed.
        max_running: requests handed to an engine at once; 0, or more than that, is its profile's ``max_num_seqs`` and 2
            to follow on. Those wait at the engine by arrival, all others here, fair by key.
        max_queue: requests that wait for one of those places; one more is answered 429, or takes the place of the
            newest of the key that has most waiting, if its own key has fewer.
        queue_timeout_s: longest wait for a place, or for a model to load, in seconds; less for a client that says how
            long it waits itself.
        tls_certificate: PEM file with the certificate and its chain; empty takes the systemd credential
            ``tls-certificate``, and without one the gateway speaks plain HTTP.
        tls_key: PEM file with its key, without a passphrase; empty takes the systemd credential ``tls-key``.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    insecure: bool = False
    max_body_bytes: Bytes = 32 * 2**20
    max_bodies_bytes: Bytes = 512 * 2**20
    max_header_bytes: Annotated[int, Field(ge=4096)] = 64 * 2**10
    header_timeout_s: Seconds = 30.0
    send_timeout_s: Seconds = 60.0
    keep_alive_s: Annotated[int, Field(ge=1)] = 150
    max_running: Annotated[int, Field(ge=0)] = 0
    max_queue: Annotated[int, Field(ge=0)] = 256
    queue_timeout_s: Seconds = 600.0
    tls_certificate: str = ""
    tls_key: str = ""


class Engine(_Section):
    """vLLM and how it is started, watched and stopped.

    Attributes:
        python: interpreter that has vLLM; empty takes the one of ``.venv-engine`` in the checkout this runs from.
        stall_timeout_s: a start with no log line, CPU time or I/O for this long has hung, in seconds.
        drain_timeout_s: time that running requests have to end when stopping, in seconds.
        stop_timeout_s: time the engine has to exit after that before it is killed, in seconds.
        restart_budget: restarts allowed within ``restart_window_s``.
        restart_window_s: in seconds.
        freeze_timeout_s: requests run but the iteration counter stands still for this long: frozen, in seconds.
        scrape_interval_s: time between two readings of the engine's metrics, in seconds.
    """

    python: str = ""
    stall_timeout_s: Seconds = 120.0
    drain_timeout_s: Seconds = 30.0
    stop_timeout_s: Seconds = 20.0
    restart_budget: Annotated[int, Field(ge=0)] = 3
    restart_window_s: Seconds = 1800.0
    freeze_timeout_s: Seconds = 120.0
    scrape_interval_s: Seconds = 2.0


class Paths(_Section):
    """Where things lie. Empty means: systemd's directory variables, else the XDG base directories.

    Attributes:
        state: models, receipts, API keys.
        cache: compile caches, one namespace per manifest.
        runtime: the engine's socket.
        profiles: the owner's profiles; they take the place of shipped ones of the same name.
    """

    state: str = ""
    cache: str = ""
    runtime: str = ""
    profiles: str = "/etc/spark-llm/profiles"


class Store(_Section):
    """Models on disk and how they are fetched.

    Attributes:
        endpoint: base URL of the hub; empty takes ``$HF_ENDPOINT``, else huggingface.co.
        token_file: file with the hub token, read by the fetching process, ``fit`` and ``doctor``, never by the service
            itself. The systemd credential ``hub-token`` comes before it; after it come ``$HF_TOKEN`` and the file that
            ``hf auth login`` writes.
        reserve_bytes: disk space that a download leaves free, in bytes.
        workers: files fetched at once.
        stall_timeout_s: a transfer without a byte for this long is killed and tried again, in seconds.
        attempts: tries in a row that may bring nothing before a fetch gives up.
        backoff_s: wait before the second try, in seconds; doubles up to a minute.
        xet: let the first try use the hub's Xet storage; later ones never do.
    """

    endpoint: str = ""
    token_file: str = ""
    reserve_bytes: Annotated[int, Field(ge=0)] = 10 * 2**30
    workers: Annotated[int, Field(ge=1, le=64)] = 8
    stall_timeout_s: Seconds = 60.0
    attempts: Annotated[int, Field(ge=1)] = 6
    backoff_s: Seconds = 1.0
    xet: bool = True


class Cache(_Section):
    """Compile caches.

    Attributes:
        max_bytes: all namespaces together, in bytes; the least recently used go first.
        keep: namespaces that stay whatever they take, so that the way back to the last model is warm.
    """

    max_bytes: Bytes = 40 * 2**30
    keep: Annotated[int, Field(ge=1)] = 2


class Memory(_Section):
    """How much of the machine the engine may take. A size of 0 is derived from the machine's.

    Attributes:
        reserve_bytes: kept for the host at a start; an eighth of the machine, 16 GiB at most.
        soft_floor_bytes: below it no request is admitted; a tenth of the machine, 12 GiB at most.
        hard_floor_bytes: below it the engine is killed; a twentieth, 6 GiB at most.
        free_floor_bytes: as ``hard_floor_bytes``, but of free memory; an eightieth, 1.5 GiB at most.
        gate_timeout_s: longest wait for memory before a start, in seconds.
        drivers: beginnings of NVIDIA driver versions known to work; others are warned of. Graph capture hangs on 590.
    """

    reserve_bytes: Annotated[int, Field(ge=0)] = 0
    soft_floor_bytes: Annotated[int, Field(ge=0)] = 0
    hard_floor_bytes: Annotated[int, Field(ge=0)] = 0
    free_floor_bytes: Annotated[int, Field(ge=0)] = 0
    gate_timeout_s: Seconds = 300.0
    drivers: tuple[str, ...] = ("580.",)


class Admission(_Section):
    """How the requests of one key are held back for the others'; requests without a key share one. See ``[gateway]``.

    Attributes:
        max_running_per_key: requests of one key at the engine at once; 0 for no limit of its own.
        max_queue_per_key: requests of one key that wait; 0 for no limit of its own.
    """

    max_running_per_key: Annotated[int, Field(ge=0)] = 0
    max_queue_per_key: Annotated[int, Field(ge=0)] = 0


class Models(_Section):
    """Models beside the first one.

    Attributes:
        on_demand: load a profile when a request asks for its model; the profiles are read at the start and on a reload.
        max_loaded: engines at once, the first one included; the ledger must allow each.
        max_waiting: requests that may wait for one model to load; one more is answered 429.
        ttl_s: unload a model that nobody asked for during this time, in seconds; 0 keeps it.
        pinned: profiles that are loaded at the start and never unloaded.
    """

    on_demand: bool = False
    max_loaded: Annotated[int, Field(ge=1)] = 1
    max_waiting: Annotated[int, Field(ge=1)] = 32
    ttl_s: Annotated[float, Field(ge=0)] = 0.0
    pinned: tuple[str, ...] = ()


class Log(_Section):
    """What is written to the log.

    Attributes:
        level: least severe line that is written.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(BaseSettings):
    """All of it. Frozen: a reload builds a new one."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter="__"
    )

    profile: str = ""
    gateway: Gateway = Gateway()
    engine: Engine = Engine()
    paths: Paths = Paths()
    store: Store = Store()
    memory: Memory = Memory()
    admission: Admission = Admission()
    cache: Cache = Cache()
    models: Models = Models()
    log: Log = Log()


def load(file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from all sources.

    Args:
        file: TOML file; None takes ``$SPARK_LLM_CONFIG``, else ``/etc/spark-llm/config.toml`` if it is there.
        flags: values given on the command line, nested like the TOML; None values do not count.

    Raises:
        ConfigError: a file that cannot be read, an unknown key or a wrong type; names the key.
    """
    path = _file(file)
    _refuse_unknown_environment()
    given = _without_none(flags or {})
    written = _read(path) if path else {}

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: object, **__: object
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (
                InitSettingsSource(settings_cls, init_kwargs=given),
                EnvSettingsSource(settings_cls),
                InitSettingsSource(settings_cls, init_kwargs=written),
            )

    try:
        return Loaded()
    except ValidationError as error:
        raise ConfigError(explain(error, Settings), hint=_where(path)) from error
    except SettingsError as error:
        raise ConfigError(str(error), hint=_where(path)) from error


def _file(file: Path | None) -> Path | None:
    if file is None and (named := os.environ.get(f"{ENV_PREFIX}CONFIG")):
        file = Path(named)
    if file is not None:
        return file
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(undecodable(path, error)) from error


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    cleaned = {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }
    return {key: value for key, value in cleaned.items() if value != {}}


def _refuse_unknown_environment() -> None:
    """A mistyped variable would otherwise be ignored without a word."""
    known = {f"{ENV_PREFIX}{field.upper()}" for field in Settings.model_fields}
    for name in os.environ:
        if not name.startswith(ENV_PREFIX) or name in _OTHER_VARIABLES:
            continue
        first = ENV_PREFIX + name.removeprefix(ENV_PREFIX).split("__")[0]
        if first not in known:
            near = difflib.get_close_matches(name, known | _OTHER_VARIABLES, n=1, cutoff=0.5)
            advice = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown environment variable {name}{advice}")


def _where(path: Path | None) -> str:
    read = f"{path}, " if path else ""
    return f"Looked at: flags, {ENV_PREFIX}* variables, {read}defaults."
