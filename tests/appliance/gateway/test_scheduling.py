"""The gateway's scheduling policy, as the kernel has it, and what it starts under either."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import spark_llm
from spark_llm.gateway.scheduling import Scheduling

LAUNCH = Path(spark_llm.__file__).with_name("launch.py")
SHOW = "import os; print(os.sched_getscheduler(0))"


def test_many_requests_are_passed_on_in_turn() -> None:
    """With more requests than cores the thread interrupts nobody; with fewer it is an ordinary one again."""
    scheduling = Scheduling(cores=2)
    seen = []

    def serve() -> None:
        with scheduling, scheduling:
            seen.append(os.sched_getscheduler(0))
            with scheduling:
                seen.append(os.sched_getscheduler(0))
            seen.append(os.sched_getscheduler(0))

    thread = threading.Thread(
        target=serve
    )  # the policy is a thread's own: nothing is left of it here
    thread.start()
    thread.join()
    assert seen == [os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_OTHER]


def test_an_engine_started_meanwhile_is_an_ordinary_process() -> None:
    """What launch.py becomes has the ordinary policy, whichever its parent had just then."""
    command = [sys.executable, "-IS", str(LAUNCH), str(os.getpid()), "", sys.executable, "-c", SHOW]
    done = subprocess.run(
        ["chrt", "--batch", "0", *command], capture_output=True, text=True, timeout=30, check=True
    )
    assert int(done.stdout) == os.SCHED_OTHER


def test_a_guard_started_meanwhile_is_an_ordinary_process() -> None:
    """The memory guard does not wait for a core, whatever its parent does."""
    guarded = [sys.executable, "-m", "spark_llm.guard", "--process-group"]
    with (
        subprocess.Popen(["sleep", "60"], start_new_session=True) as engine,
        subprocess.Popen(
            ["chrt", "--batch", "0", *guarded, str(engine.pid)], stdout=subprocess.PIPE
        ) as guard,
    ):
        assert guard.stdout
        guard.stdout.readline()
        policy = os.sched_getscheduler(guard.pid)
        engine.kill()
        engine.wait()
        assert guard.wait(timeout=10) == 0
    assert policy == os.SCHED_OTHER
