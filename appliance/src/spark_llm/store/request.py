"""What to bring into the store, and how: the argument of the fetching process."""

import json
import sys
from dataclasses import KW_ONLY, asdict, dataclass

DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class Request:
    """What to bring, and how.

    Attributes:
        root: the store.
        model: ``ORG/NAME``.
        revision: branch, tag or commit; empty means the hub's default branch.
        refresh: ask the hub what a branch stands for now; False keeps to what was recorded.
        allow_pickle: accept weights whose loading runs code.
        adopt: folder or hub cache to take files from, see ``adopt``; empty for none.
        dry_run: stop before the first byte and say what would be fetched.
        endpoint: see ``config.Store``, as all below; the settings have the defaults, and only they.
        token_file: a path, never the token.
        reserve_bytes: in bytes.
        workers: files at once.
        stall_timeout_s: in seconds.
        attempts: tries in a row without progress.
        backoff_s: in seconds.
        xet: whether the first try may use Xet.
    """

    root: str
    model: str
    revision: str = ""
    refresh: bool = False
    allow_pickle: bool = False
    adopt: str = ""
    dry_run: bool = False
    _: KW_ONLY
    endpoint: str
    token_file: str
    reserve_bytes: int
    workers: int
    stall_timeout_s: float
    attempts: int
    backoff_s: float
    xet: bool

    def command(self) -> list[str]:
        """The process that serves this request; its arguments hold no secret.

        ``-P``: what lies in the folder where the command was called must not be imported.
        """
        return [sys.executable, "-P", "-m", "spark_llm.store.fetch", json.dumps(asdict(self))]

    @property
    def branch(self) -> str:
        """The revision, or the hub's default branch."""
        return self.revision or DEFAULT_REVISION
