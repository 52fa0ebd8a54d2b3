"""Becomes another program that dies with its parent: ``python -IS launch.py PARENT_PID PROGRAM ARG...``.

Stdlib only and run as a script, so that it costs milliseconds. It exists because a function run between fork and exec
(``preexec_fn``) is not safe in a process that has threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: list[str]) -> None:
    """Ask for SIGKILL at the parent's death, then exec."""
    parent, program = int(arguments[0]), arguments[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)
    os.execv(program[0], program)  # noqa: S606  no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
