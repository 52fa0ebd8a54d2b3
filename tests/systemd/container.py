"""A real systemd as PID 1 in a systemd-nspawn container over this machine's own tree.

The root is an overlay: the machine's own file system below, a tmpfs above, so that nothing done inside stays. The
network is private, cgroups are version 2. A host with version 1 leaves those without resource controllers: memory and
task limits are then set but not enforced; delegation, ``cgroup.kill``, devices and address filters work.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from spark_llm import cgroup

TREE = Path(__file__).parents[2]
SWITCH = "SPARK_LLM_NO_NSPAWN"
PACKAGES = "SYSTEMD_DEBS"
"""Folder of Debian packages (systemd, libsystemd0, libsystemd-shared) to boot in place of the machine's systemd."""
CONFIG = "/etc/spark-llm/config.toml"
NO_ENGINE = '[engine]\npython = "/nonexistent/python"\n'
"""The service answers but is blocked: little about systemd needs the engine, whose start takes half a minute."""
_TARGET = "spark-test.target"
_HIDDEN = ("/root", "/home", "/tmp")
T = TypeVar("T")


class Unable(Exception):  # noqa: N818  not an error of the tested program
    """This machine cannot run the container."""


class Container:
    """A booted machine.

    Attributes:
        root: its file system, seen from outside.
        url: where the service answers inside.
    """

    def __init__(self, root: Path, leader: int) -> None:
        self.root = root
        self.url = "http://127.0.0.1:8000"
        self._leader = leader

    def run(
        self, *command: str, check: bool = True, stdin: str | None = None, timeout: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command inside, as root."""
        done = subprocess.run(
            ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "--", *command],
            check=False,
            capture_output=True,
            text=True,
            input=stdin,
            timeout=timeout,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    def spawn(self, *command: str) -> "subprocess.Popen[str]":
        """Start a command inside, as root."""
        return subprocess.Popen(
            ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "--", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )

    @contextmanager
    def serving(self, host: str, port: int) -> Iterator[None]:
        """Another program's server inside."""
        unit = "other-server.service"
        program = (
            "import http.server as h, socketserver as s; s.TCPServer.allow_reuse_address = True;"
            f"s.TCPServer(({host!r}, {port}), h.SimpleHTTPRequestHandler).serve_forever()"
        )
        self.run("systemd-run", "--quiet", f"--unit={unit}", "/usr/bin/python3", "-c", program)
        try:
            self.wait(lambda: self.http("/", url=f"http://{host}:{port}")[0] == 200, timeout=60)
            yield
        finally:
            self.systemctl("stop", unit)

    @contextmanager
    def address(self, address: str) -> Iterator[None]:
        """An address that is not loopback's, on the container's only interface."""
        self.run("ip", "address", "add", f"{address}/32", "dev", "lo")
        try:
            yield
        finally:
            self.run("ip", "address", "delete", f"{address}/32", "dev", "lo")

    def systemctl(self, *arguments: str, check: bool = True, timeout: float = 180) -> str:
        done = self.run("systemctl", *arguments, check=check, timeout=timeout)
        return (done.stdout + done.stderr).strip()

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        text = self.run("systemctl", "show", unit, f"--property={','.join(properties)}").stdout
        return dict(line.split("=", 1) for line in text.splitlines())

    def status_text(self) -> str:
        """What the service last sent as ``STATUS=``."""
        return self.show("spark-llm.service", "StatusText")["StatusText"]

    def main_pid(self, unit: str = "spark-llm.service") -> int:
        return int(self.show(unit, "MainPID")["MainPID"])

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file inside."""
        self.run("mkdir", "-p", str(Path(path).parent))
        self.run("sh", "-c", f"cat > {path} && chmod {mode:o} {path}", stdin=text)

    def http(
        self, path: str, *, key: str = "", body: object = None, url: str = ""
    ) -> tuple[int, Any]:
        """Status and JSON (or text) of a request made inside; status 0 where nobody answers."""
        command = ["curl", "-sk", "-m", "60", "-w", "\n%{http_code}", (url or self.url) + path]
        if key:
            command += ["-H", f"Authorization: Bearer {key}"]
        if body is not None:
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        text, _, status = self.run(*command, check=False).stdout.rpartition("\n")
        try:
            return int(status), json.loads(text)
        except ValueError:
            return int(status), text

    def certificate(self, folder: str, name: str) -> None:
        """Write cert.pem, made out to ``name``, and key.pem for the service."""
        self.run("mkdir", "-p", folder)
        self.run(
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", f"{folder}/key.pem", "-out", f"{folder}/cert.pem", "-days", "2", "-subj", f"/CN={name}",
        )  # fmt: skip
        self.run("chgrp", "-R", "spark-llm", folder)
        self.run("chmod", "0640", f"{folder}/key.pem")

    def subject(self) -> str:
        """To whom the certificate that the service shows is made out; empty without TLS."""
        ask = "openssl s_client -connect 127.0.0.1:8000 </dev/null 2>/dev/null | openssl x509 -noout -subject"
        return self.run("sh", "-c", ask, check=False).stdout.strip().rpartition("= ")[2]

    def systemd(self) -> int:
        """Version of the systemd that runs inside."""
        return int(self.run("systemctl", "--version").stdout.split()[1])

    def cursor(self) -> str:
        """The journal's end."""
        text = self.run("journalctl", "-n", "0", "--show-cursor", check=False).stdout
        return text.rpartition("-- cursor: ")[2].strip()

    def journal(self, *arguments: str, after: str = "") -> list[dict[str, Any]]:
        """Journal entries."""
        self.run("journalctl", "--sync")
        since = [f"--after-cursor={after}"] if after else []
        text = self.run("journalctl", "-o", "json", "--no-pager", *since, *arguments).stdout
        return [json.loads(line) for line in text.splitlines()]

    def wait(self, check: Callable[[], T | None], timeout: float = 120) -> T:
        """The first true result of ``check``; fails with the end of the journal."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if result := check():
                return result
            time.sleep(0.1)
        tail = self.run("journalctl", "-n", "60", "--no-pager").stdout
        raise AssertionError(f"not within {timeout} s; the journal's end:\n{tail}")

    def status(self, url: str = "") -> dict[str, Any]:
        code, body = self.http("/startupz", url=url)
        if code == 200:
            code, body = self.http("/readyz", url=url)
        return body if isinstance(body, dict) else {}

    def wait_state(self, *states: str, timeout: float = 180) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            status = self.status()
            return status if status.get("state") in states else None

        return self.wait(reached, timeout)


@contextmanager
def boot() -> Iterator[Container]:
    """Boot the container; yields it once systemd has reached its target.

    Raises:
        Unable: with the reason.
    """
    if str(TREE).startswith(_HIDDEN):
        raise Unable(f"hardened services cannot see {TREE}: clone it outside {', '.join(_HIDDEN)}")
    if os.geteuid() != 0:
        raise Unable("only root can mount an overlay and boot a container")
    for program in ("systemd-nspawn", "nsenter", "curl"):
        if shutil.which(program) is None:
            raise Unable(f"{program} is not installed (tests/systemd/packages.txt)")
    with (
        tempfile.TemporaryDirectory(prefix="spark-llm-nspawn.") as folder,
        _overlay(Path(folder)) as root,
    ):
        _prepare(root)
        log = Path(folder) / "console"
        with _own_cgroup() as procs, log.open("wb") as console:
            process = subprocess.Popen(
                [
                    "sh",
                    "-c",
                    'echo $$ > "$0" && exec "$@"',
                    procs,
                    "systemd-nspawn",
                    "--quiet",
                    "--register=no",
                    "--keep-unit",
                    "--private-network",
                    "--capability=CAP_BPF",
                    "--system-call-filter=bpf",  # or address and device lists are not enforced
                    f"--directory={root}",
                    f"--machine=spark-{os.getpid()}",
                    "--boot",
                    f"systemd.unit={_TARGET}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )
            try:
                yield _booted(process, root, log)
            finally:
                process.terminate()  # an orderly shutdown of the container
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _booted(process: "subprocess.Popen[bytes]", root: Path, log: Path) -> Container:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Unable(f"systemd-nspawn ended: {log.read_text(errors='replace')[-2000:]}")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/comm").read_text().strip() != "systemd":
                continue
            container = Container(root, int(child))
            state = container.run("systemctl", "is-active", _TARGET, check=False).stdout.strip()
            if state == "active":
                return container
        time.sleep(0.1)
    raise Unable(f"systemd did not come up: {log.read_text(errors='replace')[-2000:]}")


@contextmanager
def _own_cgroup() -> Iterator[Path]:
    """``cgroup.procs`` of a new cgroup: two containers in one would each clear away the other's services."""
    parent = cgroup.own()
    if parent is None:
        raise Unable("cgroup version 2 is not mounted")
    folder = parent / f"spark-llm-test-{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise Unable(f"cannot make the cgroup {folder}: {error}") from error
    try:
        yield folder / "cgroup.procs"
    finally:
        cgroup.kill(folder)
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir():
                _remove_cgroup(path)
        _remove_cgroup(folder)


def _remove_cgroup(folder: Path) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.05)


@contextmanager
def _overlay(folder: Path) -> Iterator[Path]:
    upper = folder / "upper"
    root = folder / "root"
    upper.mkdir()
    root.mkdir()
    _mount("-t", "tmpfs", "tmpfs", str(upper))
    try:
        (upper / "files").mkdir()
        (upper / "work").mkdir()
        options = f"lowerdir=/,upperdir={upper}/files,workdir={upper}/work"
        _mount("-t", "overlay", "overlay", "-o", options, str(root))
        try:
            yield root
        finally:
            subprocess.run(["umount", "--lazy", str(root)], check=False)
    finally:
        subprocess.run(["umount", "--lazy", str(upper)], check=False)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unable(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


def _prepare(root: Path) -> None:
    units = root / "etc/systemd/system"
    units.mkdir(parents=True, exist_ok=True)
    # Not the machine's own services and timers: only what systemd itself needs.
    (units / _TARGET).write_text(
        "[Unit]\nRequires=sysinit.target dbus.socket\nAfter=sysinit.target dbus.socket\n"
    )
    (root / "etc/machine-id").unlink(missing_ok=True)
    (root / "etc/machine-id").touch()
    shutil.rmtree(root / "var/log/journal", ignore_errors=True)
    if packages := os.environ.get(PACKAGES):
        _other_systemd(root, Path(packages))
    for environment in (TREE / ".venv", TREE / ".venv-engine"):
        _readable_interpreter(root, environment.resolve())


def _other_systemd(root: Path, packages: Path) -> None:
    """Lay the files of Debian packages over the root, such as a newer systemd and its libraries."""
    for package in sorted(packages.glob("*.deb")):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
            for name in ("usr", "usr/lib", "usr/bin", "usr/sbin"):
                part = Path(folder) / name.removeprefix("usr/")
                if part.is_dir():
                    subprocess.run(["cp", "-a", f"{part}/.", root / name], check=True)


def _readable_interpreter(root: Path, environment: Path) -> None:
    """Point an environment at the distribution's Python if its own lies in a home folder: services see none."""
    link = environment / "bin" / "python3"
    own = link.resolve()
    if not str(own).startswith(_HIDDEN):
        return
    system = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
    if not system.exists():
        raise Unable(f"{own} lies in a home folder, and {system} is not installed")
    inside = root / environment.relative_to("/")
    (inside / "bin" / "python3").unlink()
    (inside / "bin" / "python3").symlink_to(system)
    settings = inside / "pyvenv.cfg"
    lines = [
        "home = /usr/bin" if line.startswith("home") else line
        for line in settings.read_text().splitlines()
    ]
    settings.write_text("\n".join(lines) + "\n")


@contextmanager
def container_or_reason() -> Iterator[Container]:
    """The container; a machine that cannot run one fails, unless it says that it may."""
    try:
        with boot() as container:
            yield container
    except Unable as reason:
        if os.environ.get(SWITCH) == "1":
            pytest.skip(f"no container ({SWITCH}=1): {reason}")
        pytest.fail(f"{reason}\nSet {SWITCH}=1 to do without these tests on such a machine.")
