"""Runs in the engine's place, with everything the engine inherits, and says what it can do: one line of JSON."""

import ctypes
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

REAL = "@engine@"
OUTSIDE = "@outside@"


def attempt(act: Callable[[], object]) -> str:
    """``ok``, or the name of what stopped it."""
    try:
        act()
    except OSError as error:
        return type(error).__name__ if error.errno is None else os.strerror(error.errno)
    return "ok"


def read(path: str) -> None:
    found = Path(path)
    if found.is_dir():
        list(found.iterdir())
    else:
        found.read_bytes()


def write(path: str) -> None:
    Path(path).write_text("x", encoding="ascii")
    Path(path).unlink()


def open_device(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def connect(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=10):
        pass


def new_code() -> None:
    """Memory that is writable and executable, as a JIT compiler maps it."""
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
        pass


def unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000):  # CLONE_NEWUSER
        raise OSError(ctypes.get_errno(), "unshare")


def forge() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("/run/systemd/notify")
        notify.send(b"MAINPID=1\nSTATUS=forged")


def main() -> None:
    """Try everything."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    facts = {
        "cgroup": Path("/proc/self/cgroup").read_text(encoding="ascii"),
        "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii")),
        "user": os.getuid(),
        "capabilities": next(line for line in status if line.startswith("CapBnd")).split()[1],
        "no_new_privs": next(line for line in status if line.startswith("NoNewPrivs")).split()[1],
        "environment": sorted(os.environ),
        "read": {
            path: attempt(partial(read, path))
            for path in (
                "/root",
                "/home",
                "/etc/shadow",
                "/etc/credstore",
                "/etc/credstore/spark-llm.hub-token",
                "/run/credentials/spark-llm-fetch@x.service/hub-token",
                "/var/lib/spark-llm",
            )
        },
        "write": {
            path: attempt(partial(write, path + "/probe"))
            for path in (
                "/etc",
                "/usr",
                "/var/lib",
                "/run",
                "/opt",
                "/etc/spark-llm",
                "/var/lib/spark-llm",
                "/var/cache/spark-llm",
                "/run/spark-llm",
                "/tmp",
            )
        },
        "network": {
            "loopback": attempt(lambda: connect(("127.0.0.1", 8000))),
            "outside": attempt(lambda: connect((OUTSIDE, 9000))),
        },
        "device": {
            path: attempt(partial(open_device, path)) for path in ("/dev/null", "/dev/probe")
        },
        "new_code": attempt(new_code),
        "namespaces": attempt(unshare),
        "forge": attempt(forge),
    }
    print("PROBE", json.dumps(facts), flush=True)


if __name__ == "__main__":
    if "serve" not in sys.argv:
        os.execv(REAL, [REAL, *sys.argv[1:]])
    main()
