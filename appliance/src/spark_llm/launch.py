"""Becomes another program that dies with its parent: ``python -IS launch.py PARENT_PID CGROUP PROGRAM ARG...``.

CGROUP is the folder of the cgroup to enter first; empty stays. The kernel's OOM killer takes the program first. The
controller's way to share processors (``SCHED_BATCH``) is not passed on.

Stdlib only and run as a script, so that it costs milliseconds. It exists because a function run between fork and exec
(``preexec_fn``) is not safe in a process that has threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OOM_SCORE_ADJ = "800"


def main(arguments: list[str]) -> None:
    """Enter the cgroup, ask for SIGKILL at the parent's death, then exec."""
    parent, folder, program = int(arguments[0]), arguments[1], arguments[2:]
    if folder:
        _write(f"{folder}/cgroup.procs", "0")
    _write("/proc/self/oom_score_adj", _OOM_SCORE_ADJ)
    if os.sched_getscheduler(0) == os.SCHED_BATCH:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)
    os.execv(program[0], program)  # noqa: S606  no shell is wanted


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as stream:  # noqa: PTH123  pathlib costs milliseconds
        stream.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
