"""The fetching process for asynchronous callers: the controller's phases and the API's jobs."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from spark_llm.store.progress import Event, Failure, Result, decode
from spark_llm.store.request import Request

_STOP_TIMEOUT_S = 5.0


async def fetch(request: Request) -> AsyncGenerator[Event]:
    """Events of a fetching process, started for ``request`` and stopped when the iterator is closed or cancelled.

    The last one is a ``Result`` or a ``Failure``, whatever happens to the process.
    """
    process = await asyncio.create_subprocess_exec(
        *request.command(), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None  # noqa: S101  for the type checker: it is a pipe
    ended = False
    try:
        async for line in process.stdout:
            event = decode(line)
            ended = isinstance(event, Result | Failure)
            yield event
        await process.wait()
        if not ended:
            yield Failure.silent(process.returncode)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
