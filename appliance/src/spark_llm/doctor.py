"""Looks the machine over: each finding is ok, warn or fail, with what to do. Changes nothing unless asked to repair."""

import http.client
import os
import shutil
import ssl
import stat
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from spark_llm.caches import CacheRoot
from spark_llm.config import Settings
from spark_llm.errors import SparkLlmError
from spark_llm.folders import Folders
from spark_llm.store import durable
from spark_llm.store.credentials import CREDENTIAL, check_endpoint, read_token, token_sources
from spark_llm.store.layout import ModelFolder, model_folders
from spark_llm.store.plan import gigabytes
from spark_llm.store.store import Store, free_bytes

_HUB = "https://huggingface.co"
_TIMEOUT_S = 5.0
_CLOCK_WARN_S = 30.0
_CLOCK_FAIL_S = 300.0
"""TLS certificates and signed addresses are judged by the clock; S3 refuses requests 15 minutes off."""


class Level(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at.
        level: ok, warn or fail.
        message: what was found.
        hint: what to do; empty where nothing is to be done.
    """

    check: str
    level: Level
    message: str
    hint: str = ""


def examine(
    settings: Settings, folders: Folders, environment: Mapping[str, str], *, repair: bool = False
) -> list[Finding]:
    """All findings, in the order of the checks.

    Args:
        settings: whose store, cache and hub.
        folders: where they lie.
        environment: for the token and the endpoint.
        repair: remove leftovers of crashes that nobody uses.
    """
    endpoint = settings.store.endpoint or environment.get("HF_ENDPOINT") or _HUB
    return [
        *check_disk(folders.models, settings.store.reserve_bytes),
        *check_folders(folders),
        *check_hub(endpoint, settings.store.token_file, environment),
        *check_models(folders.models),
        *check_leftovers(folders.models, repair=repair),
        *check_locks(folders.models),
        *check_caches(CacheRoot(folders.cache), settings.cache.max_bytes),
        *check_driver(settings.memory.drivers),
        *check_versions(),
    ]


def check_disk(models: Path, reserve: int) -> Iterable[Finding]:
    """Room for at least the reserve, in bytes."""
    free = free_bytes(models)
    if free < reserve:
        message = (
            f"{gigabytes(free)} free at {models}, less than the reserve of {gigabytes(reserve)}"
        )
        yield Finding(
            "disk",
            Level.WARN,
            message,
            "`spark-llm models`, `spark-llm rm`, `spark-llm cache prune`.",
        )
    else:
        yield Finding("disk", Level.OK, f"{gigabytes(free)} free at {models}")


def check_folders(folders: Folders) -> Iterable[Finding]:
    """State, models and cache: there, ours to write, not everybody's."""
    for name, folder in (
        ("state", folders.state),
        ("models", folders.models),
        ("cache", folders.cache),
    ):
        if not folder.exists():
            yield Finding(
                name, Level.OK, f"{folder} is not there yet; the first start or pull makes it"
            )
            continue
        status = folder.stat()
        if not os.access(folder, os.W_OK | os.X_OK):
            owner = f"user {status.st_uid}, group {status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}"
            hint = "Run as the service's user or join its group; a shared store has mode 2775."
            yield Finding(
                name,
                Level.WARN,
                f"{folder} cannot be written by user {os.getuid()} ({owner})",
                hint,
            )
        elif status.st_mode & stat.S_IWOTH:
            yield Finding(
                name, Level.FAIL, f"{folder} can be written by everybody", f"chmod o-w {folder}"
            )
        else:
            yield Finding(name, Level.OK, f"{folder} can be written")


def check_hub(endpoint: str, token_file: str, environment: Mapping[str, str]) -> Iterable[Finding]:
    """Whether the hub answers, what time it has, and whether it knows the token."""
    try:
        status, date = _ask(endpoint, "/api/models?limit=1", None)
    except (OSError, http.client.HTTPException, ValueError) as error:
        hint = "Serving needs no network; to pull, check the network, the proxy and HF_ENDPOINT."
        yield Finding("hub", Level.WARN, f"{endpoint} cannot be reached: {error}", hint)
        yield from _token_file_modes(token_file)
        return
    yield Finding("hub", Level.OK, f"{endpoint} answers ({status})")
    yield from check_clock(date, time.time())
    yield from _token_file_modes(token_file)
    yield from _check_token(endpoint, token_file, environment)


def check_clock(date: str, now: float) -> Iterable[Finding]:
    """The hub's Date header against this machine's clock."""
    try:
        off = abs(parsedate_to_datetime(date).timestamp() - now)
    except (TypeError, ValueError):
        return
    level = Level.FAIL if off > _CLOCK_FAIL_S else Level.WARN if off > _CLOCK_WARN_S else Level.OK
    hint = "" if level is Level.OK else "timedatectl set-ntp true"
    yield Finding("clock", level, f"{off:.0f} s away from the hub's", hint)


def _check_token(
    endpoint: str, token_file: str, environment: Mapping[str, str]
) -> Iterable[Finding]:
    try:
        token = read_token(token_file, environment)
        check_endpoint(endpoint, token)
    except SparkLlmError as error:
        yield Finding("token", Level.FAIL, error.message, error.hint)
        return
    if token is None:
        message = "no hub token; gated and private models cannot be fetched"
        yield Finding(
            "token",
            Level.OK,
            message,
            "For gated models: sudo install -Dm600 FILE /etc/credstore/spark-llm.hub-token",
        )
        return
    source = next(token_sources(token_file, environment))[0]
    try:
        status, _ = _ask(endpoint, "/api/whoami-v2", token)
    except (OSError, http.client.HTTPException) as error:
        yield Finding("token", Level.WARN, f"the token from {source} could not be checked: {error}")
        return
    if status == http.client.OK:
        yield Finding("token", Level.OK, f"the hub knows the token from {source}")
    else:
        yield Finding(
            "token",
            Level.FAIL,
            f"the hub refuses the token from {source} ({status})",
            "Renew it at the hub.",
        )


def _token_file_modes(token_file: str) -> Iterable[Finding]:
    path = Path(token_file) if token_file else None
    if path is None or not path.exists():
        return
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        hint = f"chmod 600 {path}, or better: LoadCredential={CREDENTIAL}:{path}"
        yield Finding("token file", Level.FAIL, f"{path} can be read by others", hint)


def _ask(endpoint: str, path: str, token: str | None) -> tuple[int, str]:
    """Status and Date of one answer. The library is not imported here: it would remember its settings.

    Raises:
        OSError, HTTPException: no answer.
        ValueError: the endpoint is no address.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not an http:// or https:// address")
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=_TIMEOUT_S, context=context
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
    try:
        headers = {"User-Agent": "spark-llm"} | (
            {"Authorization": f"Bearer {token}"} if token else {}
        )
        connection.request("GET", parts.path.rstrip("/") + path, headers=headers)
        response = connection.getresponse()
        response.read()
        return response.status, response.headers.get("Date", "")
    finally:
        connection.close()


def check_models(models: Path) -> Iterable[Finding]:
    """Snapshots that are not as they were when they were verified."""
    stored = Store(models).models()
    for model in stored:
        name = f"{model.model}@{model.commit[:12]}"
        if model.state in ("changed", "damaged"):
            hint = f"`spark-llm pull {model.model}@{model.commit}` looks at it and fetches what is wrong."
            yield Finding("model", Level.FAIL, f"{name} is {model.state}", hint)
        elif model.state == "unfinished":
            hint = f"`spark-llm pull {model.model}` goes on, `spark-llm rm {model.model}@{model.commit}` gives up."
            yield Finding(
                "model", Level.WARN, f"{name} is unfinished, {gigabytes(model.bytes)} so far", hint
            )
    ready = [model for model in stored if model.state == "ready"]
    yield Finding(
        "models", Level.OK, f"{len(ready)} ready, {gigabytes(sum(model.bytes for model in ready))}"
    )


def check_leftovers(models: Path, *, repair: bool) -> Iterable[Finding]:
    """Temporary names of crashes, and quarantined files."""
    for folder in model_folders(models):
        found = [*leftovers(folder)]
        if not found:
            continue
        size = sum(_size(path) for path in found)
        names = f"{len(found)} leftovers of {folder.model}, {gigabytes(size)}"
        if not repair:
            yield Finding(
                "leftovers", Level.WARN, names, "`spark-llm doctor --repair` removes them."
            )
            continue
        try:
            with folder.write_lock.hold("doctor"):
                for path in found:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(
                        missing_ok=True
                    )
        except (SparkLlmError, OSError) as error:
            yield Finding(
                "leftovers",
                Level.WARN,
                f"{names}: {error}",
                "Try again when nothing uses the model.",
            )
        else:
            yield Finding("leftovers", Level.OK, f"{names}: removed")
    top = list(durable.leftovers(models))
    if top and repair:
        for path in top:
            shutil.rmtree(path, ignore_errors=True)
        yield Finding("leftovers", Level.OK, f"{len(top)} leftovers of removed models: removed")
    elif top:
        hint = "`spark-llm doctor --repair` removes them."
        yield Finding("leftovers", Level.WARN, f"{len(top)} leftovers of removed models", hint)


def leftovers(folder: ModelFolder) -> Iterable[Path]:
    """What no command needs any more: temporary names anywhere in the model's folder, and its quarantine."""
    for base in (folder.path, folder.path / "incoming"):
        yield from durable.leftovers(base)
    for commit in (*folder.commits(), *folder.unfinished()):
        for base in (folder.snapshot(commit), folder.incoming(commit).path):
            yield from durable.leftovers(base / ".spark-llm")
    if (quarantine := folder.path / "quarantine").is_dir():
        yield quarantine
    if folder.progress.exists() and folder.write_lock.held() is None:
        yield folder.progress


def check_locks(models: Path) -> Iterable[Finding]:
    """Who holds what. A dead owner holds nothing: the kernel let go of its lock."""
    for folder in model_folders(models):
        for lock in (folder.write_lock, folder.use_lock):
            owner = lock.held()
            if owner is not None:
                yield Finding(
                    "lock",
                    Level.OK,
                    f"{folder.model} is held by process {owner.pid} ({owner.reason})",
                )


def check_caches(root: CacheRoot, limit: int) -> Iterable[Finding]:
    """Size of the compile caches, and namespaces that no engine ever vouched for."""
    entries = root.entries()
    total = sum(entry.bytes for entry in entries)
    message = f"{len(entries)} compile caches, {gigabytes(total)}"
    if total > limit:
        yield Finding(
            "caches",
            Level.WARN,
            f"{message}, above the limit of {gigabytes(limit)}",
            "`spark-llm cache prune`.",
        )
    else:
        yield Finding("caches", Level.OK, message)
    for entry in entries:
        if not entry.sealed and not entry.in_use:
            message = (
                f"compile cache {entry.name} was never sealed: its engine did not become ready"
            )
            yield Finding(
                "caches", Level.WARN, message, "The next start with this manifest discards it."
            )


def check_driver(known: tuple[str, ...]) -> Iterable[Finding]:
    """The NVIDIA driver, if there is a GPU; ``known`` as ``memory.drivers``."""
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Finding(
            "driver", Level.OK, "no NVIDIA driver: the embedded CPU engine is what runs here"
        )
        return
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603  our own words
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding(
            "driver", Level.FAIL, f"nvidia-smi failed: {error}", "Reboot, or reinstall the driver."
        )
        return
    for line in ran.stdout.strip().splitlines():
        gpu, version = (part.strip() for part in line.rsplit(",", 1))
        yield driver_finding(gpu, version, known)


def driver_finding(gpu: str, version: str, known: tuple[str, ...]) -> Finding:
    """What to think of a driver on a GPU; with nothing ``known``, any will do."""
    if known and "GB10" in gpu and not version.startswith(known):
        names = ", ".join(f"{prefix}x" for prefix in known)
        hint = f"GB10 is known to work with {names} (memory.drivers); 590 dead-locks in CUDA graph capture."
        return Finding("driver", Level.WARN, f"{gpu} with driver {version}", hint)
    return Finding("driver", Level.OK, f"{gpu} with driver {version}")


def check_versions() -> Iterable[Finding]:
    """Libraries the store stands on."""
    names = ("spark-llm", "huggingface_hub", "hf-xet", "zstandard")
    versions = {name: _version(name) for name in names}
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    if not versions["huggingface_hub"].startswith("2."):
        yield Finding(
            "versions", Level.FAIL, text, "Install spark-llm again: it needs huggingface_hub 2."
        )
    else:
        yield Finding("versions", Level.OK, text)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(inner.lstat().st_size for inner in path.rglob("*") if not inner.is_dir())
    return path.lstat().st_size if path.exists() else 0
