"""Installs the service on a machine with systemd that is not NixOS (DGX OS), and takes it away again.

What shall be there is computed first (:func:`wanted`), compared with what is there (:func:`compare`), and only then
written: so ``--dry-run`` prints exactly what would happen, and a second run does nothing.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_llm.errors import ConfigError, RefusedError
from spark_llm.reason import Reason

MARK = (
    "# Written by `spark-llm install`; put changes of your own in a drop-in: systemctl edit NAME\n"
)
UNITS = Path("etc/systemd/system")
CONFIG = Path("etc/spark-llm/config.toml")
SYSUSERS = Path("etc/sysusers.d/spark-llm.conf")
TMPFILES = Path("etc/tmpfiles.d/spark-llm.conf")
COMMAND = Path("usr/local/bin/spark-llm")
"""sudo's PATH has this folder, and no Nix profile."""
_SHELL = "#!/bin/sh\n"
_FOLDERS = """\
# The installed service's store and caches are meant, whoever calls.
export STATE_DIRECTORY="${STATE_DIRECTORY:-/var/lib/spark-llm}"
export CACHE_DIRECTORY="${CACHE_DIRECTORY:-/var/cache/spark-llm}"
"""
GROUPS = ("video", "render", "rdma")
"""Groups whose devices the engine uses, where the machine has them."""
NOTIFY_RELOAD_SINCE = 253
"""First systemd that knows ``Type=notify-reload`` (its NEWS)."""
REFRESH_SINCE = 260
"""First systemd whose ``RefreshOnReload=`` knows ``credentials`` (its NEWS)."""
_UNIT_KINDS = (".service", ".socket", ".target")


@dataclass(frozen=True)
class Site:
    """What differs from machine to machine.

    Attributes:
        bin: folder with the commands.
        listen: what the socket listens on.
        clients: who may connect, for ``IPAddressAllow=``.
        gateway: where this machine itself asks the gateway, likewise.
        groups: which of :data:`GROUPS` exist.
        systemd: its version.
    """

    bin: Path
    listen: str = "127.0.0.1:8000"
    clients: str = "localhost"
    gateway: str = "localhost"
    groups: tuple[str, ...] = ()
    systemd: int = 255


@dataclass(frozen=True)
class Change:
    """One file to write or to remove.

    Attributes:
        path: below the root.
        text: contents; None removes the file.
        new: nothing is there yet.
    """

    path: Path
    text: str | None
    new: bool

    def sentence(self) -> str:
        """For ``--dry-run`` and the report."""
        verb = "remove" if self.text is None else "create" if self.new else "change"
        return f"{verb} /{self.path}"


def shipped_units() -> Path:
    """Where the templates lie: in the package once installed, beside it in a checkout."""
    packaged = Path(__file__).parent / "_data" / "units"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "units"


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put values for the ``@name@`` of a template.

    Raises:
        KeyError: a placeholder without a value.
    """
    return re.sub(r"@([a-z_]+)@", lambda found: values[found[1]], template)


def for_systemd(unit: str, version: int) -> str:
    """The unit as this version understands it.

    Before 260 a reload does not refresh credentials; before 253 it is a signal that nobody waits for.
    """
    if version < REFRESH_SINCE:
        unit = re.sub(r"^(#.*\n)?RefreshOnReload=.*\n", "", unit, flags=re.MULTILINE)
    if version < NOTIFY_RELOAD_SINCE:
        unit = unit.replace("Type=notify-reload", "Type=notify\nExecReload=kill -HUP $MAINPID")
    return unit


def wanted(site: Site, templates: Path | None = None) -> dict[Path, str]:
    """Every file of an installation with its contents, but for the configuration, which is the owner's."""
    folder = templates or shipped_units()
    values = {
        "bin": str(site.bin),
        "listen": site.listen,
        "clients": site.clients,
        "gateway": site.gateway,
    }
    files = {
        UNITS / path.name: MARK
        + for_systemd(fill(path.read_text(encoding="utf-8"), values), site.systemd)
        for path in sorted(folder.iterdir())
        if path.suffix in _UNIT_KINDS
    }
    members = "".join(f"m spark-llm {group}\n" for group in site.groups)
    files[SYSUSERS] = MARK + (folder / "sysusers.conf").read_text(encoding="utf-8") + members
    files[TMPFILES] = MARK + (folder / "tmpfiles.conf").read_text(encoding="utf-8")
    if site.bin != Path("/") / COMMAND.parent:
        files[COMMAND] = f'{_SHELL}{MARK}{_FOLDERS}exec {site.bin}/spark-llm "$@"\n'
    return files


def compare(root: Path, files: Mapping[Path, str]) -> list[Change]:
    """What must change below ``root`` for ``files`` to be there; the configuration is only made if there is none.

    Raises:
        RefusedError: a file of that name exists and is not ours.
    """
    changes = []
    for path, text in files.items():
        present = _read(root / path)
        if present == text:
            continue
        if present is not None and not _ours(present):
            raise RefusedError(
                f"{root / path} exists and was not written by spark-llm",
                reason=Reason.BAD_CONFIG,
                hint="Move it away, then run this again; changes of your own belong in a drop-in.",
            )
        changes.append(Change(path, text, new=present is None))
    if _read(root / CONFIG) is None:
        changes.append(Change(CONFIG, skeleton(), new=True))
    return changes


def leftovers(root: Path, files: Mapping[Path, str]) -> list[Change]:
    """Units that an earlier version wrote and this one does not have."""
    folder = root / UNITS
    return [
        Change(path.relative_to(root), None, new=False)
        for path in (sorted(folder.glob("spark-llm*")) if folder.is_dir() else ())
        if path.is_file() and path.relative_to(root) not in files and _ours(_read(path))
    ]


def removal(root: Path) -> list[Change]:
    """What an uninstallation removes: everything that carries our mark."""
    ours = [Change(path, None, new=False) for path in (SYSUSERS, TMPFILES, COMMAND)]
    return leftovers(root, {}) + [change for change in ours if _ours(_read(root / change.path))]


def apply(root: Path, changes: list[Change]) -> None:
    """Write and remove, each file by one rename.

    Raises:
        ConfigError: a folder below ``root`` cannot be written.
    """
    for change in changes:
        path = root / change.path
        try:
            if change.text is None:
                path.unlink()
                continue
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.new")
            temporary.write_text(change.text, encoding="utf-8")
            temporary.chmod(0o755 if change.text.startswith(_SHELL) else 0o644)
            temporary.replace(path)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}",
                reason=Reason.UNWRITABLE_DIRECTORY,
                hint="Run it as root (sudo), or pass --prefix with a folder of yours.",
            ) from error


def skeleton() -> str:
    """What the configuration starts as."""
    return (shipped_units() / "config.toml").read_text(encoding="utf-8")


def groups_of(root: Path) -> tuple[str, ...]:
    """Which of :data:`GROUPS` the machine below ``root`` has."""
    lines = (_read(root / "etc/group") or "").splitlines()
    present = {line.split(":")[0] for line in lines}
    return tuple(name for name in GROUPS if name in present)


def listen_on(host: str, port: int) -> tuple[str, str, str]:
    """``listen``, ``clients`` and ``gateway`` of a :class:`Site` for the configured address; as nix/lib/address.nix."""
    from spark_llm.sockets import is_loopback  # noqa: PLC0415  it imports the service's settings

    local = is_loopback(host)
    address = "127.0.0.1" if host == "localhost" else f"[{host}]" if ":" in host else host
    # What listens everywhere is asked on loopback.
    asked_there = local or host in {"0.0.0.0", "::"}  # noqa: S104
    return (
        f"{address}:{port}",
        "localhost" if local else "any",
        "localhost" if asked_there else host,
    )


def _ours(text: str | None) -> bool:
    return (text or "").removeprefix(_SHELL).startswith(MARK)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")  # another's may be any program
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {os.strerror(error.errno or 0)}", hint="Run it as root (sudo)."
        ) from error
