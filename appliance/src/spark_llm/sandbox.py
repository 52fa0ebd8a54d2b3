"""What the controller gives up by itself, where a unit's setting would reach the engine too."""

import ctypes
import logging

_PR_SET_MDWE = 65  # linux/prctl.h, Linux ≥ 6.3
_REFUSE_EXEC_GAIN = 1
_NO_INHERIT = 2  # Linux ≥ 6.6

log = logging.getLogger("spark_llm")


def refuse_new_code() -> bool:
    """No memory of this process may become executable any more; False where the kernel cannot do that.

    ``MemoryDenyWriteExecute=`` would be inherited by the engine, which compiles kernels while it runs.
    """
    done: int = ctypes.CDLL(None).prctl(_PR_SET_MDWE, _REFUSE_EXEC_GAIN | _NO_INHERIT, 0, 0, 0)
    if done != 0:
        log.debug("this kernel cannot refuse new code to one process alone (Linux ≥ 6.6 can)")
    return done == 0
