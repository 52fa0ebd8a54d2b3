"""What errors of the hub library mean, where no local hub can bring them about."""

import pytest
from spark_llm.reason import Reason
from spark_llm.store.trouble import describe


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I/O error: I/O error: Permission denied (os error 13)", Reason.UNWRITABLE_DIRECTORY),
        ("I/O error: Read-only file system (os error 30)", Reason.UNWRITABLE_DIRECTORY),
        ("I/O error: No space left on device (os error 28)", Reason.NO_DISK),
        ("error sending request: Connection refused (os error 111)", Reason.NETWORK),
    ],
)
def test_xet_says_what_the_disk_said(text: str, reason: Reason) -> None:
    """Xet's exceptions have no errno but name it; a fault of the disk is told as one, and goes on without Xet."""
    trouble = describe(OSError(text), "org/name", "https://hub.test", authenticated=False)
    assert (trouble.reason, trouble.retry) == (reason, True)
