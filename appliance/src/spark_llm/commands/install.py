"""``spark-llm install | uninstall | upgrade | rollback``: the service on DGX OS."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spark_llm.errors import ConfigError, RefusedError, SparkLlmError
from spark_llm.reason import Reason

if TYPE_CHECKING:
    from spark_llm.install import Site

ROOT = Path("/")
_ENABLED = (
    "spark-llm.target",
    "spark-llm.socket",
    "spark-llm.service",
    "spark-llm-guard.service",
    "spark-llm-driver.service",
)
_DATA = ("/var/lib/spark-llm", "/etc/spark-llm", "/etc/credstore")
DISPOSABLE = ("/var/cache/spark-llm", "/var/cache/spark-llm-fetch")
"""What an uninstallation takes away beside the files: folders that systemd made for the units."""

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print every change and make none.")]
Timeout = Annotated[float, typer.Option(help="Longest wait for tokens to be proven, in seconds.")]
Prefix = Annotated[
    Path, typer.Option(help="Root of the files; other than /, nothing is started or switched.")
]


def install(  # noqa: C901, PLR0912  one step after the other, each printed before it is done
    prefix: Prefix = ROOT,
    package: Annotated[
        Path | None, typer.Option(help="Folder with bin/spark-llm; without it this program's.")
    ] = None,
    start: Annotated[bool, typer.Option("--start", help="Start it as well.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Install the systemd service: users, units, a first configuration. Running it again repairs."""
    from spark_llm import generations
    from spark_llm import install as files

    program = (package / "bin" / "spark-llm") if package else Path(sys.argv[0]).absolute()
    if not program.is_file():
        raise ConfigError(
            f"{program} is not there", hint="Pass --package with a folder that has it."
        )
    stored = generations.store_path(program)
    folder = generations.PROFILE / "bin" if stored else program.parent
    live = prefix == ROOT
    if live and not dry_run:
        _need_root()
    site = _site(prefix, folder)
    target = files.wanted(site)
    changes = files.compare(prefix, target) + files.leftovers(prefix, target)
    switch = live and stored is not None and generations.current() != stored
    for change in changes:
        typer.echo(change.sentence())
    if switch:
        typer.echo(f"make {stored} the newest generation of {generations.PROFILE}")
    enable = [name for name in _ENABLED if live and not _enabled(name)]
    if enable:
        typer.echo(f"enable {' '.join(enable)}")
    if not (changes or switch or enable or start):
        typer.echo("nothing to do")
    if dry_run:
        return
    if switch and stored:
        generations.select(stored)
    files.apply(prefix, changes)
    if not live:
        return
    if changes:
        _run("systemd-sysusers", str(prefix / files.SYSUSERS))
        _run("systemd-tmpfiles", "--create", str(prefix / files.TMPFILES))
        _run("systemctl", "daemon-reload")
    if enable:
        _run("systemctl", "enable", "--quiet", *enable)
    if start:
        _run("systemctl", "start", "spark-llm.target")
    elif changes:
        typer.echo("Start it with: systemctl start spark-llm.target")


def uninstall(  # noqa: C901  as above
    prefix: Prefix = ROOT, dry_run: DryRun = False
) -> None:
    """Stop and remove the service; models, keys and configuration stay."""
    from spark_llm import generations
    from spark_llm import install as files

    live = prefix == ROOT
    if live and not dry_run:
        _need_root()
    changes = files.removal(prefix)
    disposable = [
        prefix / path.lstrip("/") for path in DISPOSABLE if (prefix / path.lstrip("/")).exists()
    ]
    if changes and live:
        typer.echo("stop and disable all units")
    for change in changes:
        typer.echo(change.sentence())
    for path in disposable:
        typer.echo(f"remove {path}")
    if not changes and not disposable:
        typer.echo("nothing to do")
    if not dry_run:
        if changes and live:
            units = [change.path.name for change in changes if change.path.parent == files.UNITS]
            if names := [name for name in units if "@" not in name]:  # none after a half-done one
                _run("systemctl", "disable", "--quiet", "--now", *names)
        files.apply(prefix, changes)
        for path in disposable:
            shutil.rmtree(path)
        if live:
            _run("systemctl", "daemon-reload")
            for link in generations.forget():
                typer.echo(f"remove {link}")
    left = [path for path in _DATA if (prefix / path.lstrip("/")).exists()]
    if left:
        typer.echo(f"left: {' '.join(left)} and the users spark-llm, spark-llm-fetch who own them")


def upgrade(
    package: Annotated[Path, typer.Argument(help="Store path of the new version.")],
    timeout: Timeout = 1800.0,
    dry_run: DryRun = False,
) -> None:
    """Switch to another version; if its tokens are not proven, go back by itself."""
    from spark_llm import generations

    stored = generations.store_path(package)
    if stored is None or not (stored / "bin" / "spark-llm").is_file():
        raise ConfigError(
            f"{package} is no spark-llm in {generations.STORE}",
            hint="Build it first: nix build --print-out-paths FLAKE#spark-llm",
        )
    before = generations.current()
    if before is None:
        raise RefusedError(
            f"nothing is installed at {generations.PROFILE}",
            reason=Reason.NOT_FOUND,
            hint=f"Run {stored}/bin/spark-llm install first.",
        )
    typer.echo(f"from {before}\n  to {stored}")
    if dry_run:
        return
    _need_root()
    try:
        generations.select(stored)
        _take_over(stored, timeout)
    except SparkLlmError as error:
        typer.echo(f"the upgrade failed: {error.message}", err=True)
        if generations.current() == before:  # never switched, or it is the same version
            end = f"{before} stays installed"
        else:
            generations.go_back_to(before)
            _take_over(before, timeout)
            end = f"{before} serves again"
        raise SparkLlmError(
            f"upgrade failed, {end}", reason=error.reason, hint=f"It said: {error.message}"
        ) from error
    typer.echo(f"{stored} serves")


def rollback(timeout: Timeout = 1800.0) -> None:
    """Go back to the version before this one."""
    from spark_llm import generations

    _need_root()
    package = generations.roll_back()
    _take_over(package, timeout)
    typer.echo(f"{package} serves")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (install, uninstall, upgrade, rollback):
        app.command()(command)


def _take_over(package: Path, timeout: float) -> None:
    """Let the package of the current generation write its units, restart the service, wait for proven tokens."""
    program = str(package / "bin" / "spark-llm")
    _run(program, "install")
    _run("systemctl", "restart", "spark-llm.service")
    _run(program, "wait", "--ready", "--timeout", str(timeout))


def _site(prefix: Path, folder: Path) -> "Site":
    from spark_llm import config
    from spark_llm import install as files

    path = prefix / files.CONFIG
    gateway = config.load(path).gateway if path.is_file() else config.Gateway()
    address = files.listen_on(gateway.host, gateway.port)
    return files.Site(folder, *address, files.groups_of(prefix), _systemd_version())


def _systemd_version() -> int:
    """As ``systemctl --version`` says: "systemd 255 (255.4-1ubuntu8)"."""
    try:
        said = subprocess.run(
            ["systemctl", "--version"],  # noqa: S607  found on PATH
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return int(said.split()[1])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        raise RefusedError(
            "systemd is not there",
            reason=Reason.NOT_FOUND,
            hint="Without it, `spark-llm serve` runs the same service in the foreground.",
        ) from error


def _enabled(unit: str) -> bool:
    done = subprocess.run(  # noqa: S603  the arguments are ours
        ["systemctl", "is-enabled", "--quiet", unit],  # noqa: S607  found on PATH
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def _need_root() -> None:
    import os

    if os.geteuid() != 0:
        raise RefusedError(
            "this changes the system and needs root",
            reason=Reason.UNWRITABLE_DIRECTORY,
            hint="Run it with sudo; --dry-run shows what it would do.",
        )


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  ours
    if done.returncode != 0:
        raise SparkLlmError(
            f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}",
            reason=Reason.INTERNAL,
        )
