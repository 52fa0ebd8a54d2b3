"""General vLLM plugin of the embedded CPU engine: runs in the API, engine-core and worker processes."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def register() -> None:
    """Ask for AMX tiles early and tie this process's life to its parent's.

    AMX: with ``--enforce-eager`` nothing in vLLM 0.32.0 asks the kernel for AMX tile permission before the attention
    kernel uses tiles, so a first prompt of 2-4 tokens dies of SIGILL on AMX hosts. ``torch.cpu._init_amx`` asks, and
    does nothing on other processors.

    Parent: in vLLM 0.32.0 the worker of a killed parent lives on and keeps serving. The kernel sends the signal when
    the thread that forked this process ends; vLLM forks from main threads, so a living parent never triggers it.
    """
    import torch  # noqa: PLC0415  vLLM has it loaded by now; a module-level import would slow every entry-point scan

    torch.cpu._init_amx()  # noqa: SLF001  the only door there is
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
