"""Kills a pull, a repair or an import at a random moment, again and again, and looks at the store each time.

``python tests/hub/kill_rounds.py ENDPOINT FOLDER ROUNDS SEED``. One process with everything imported forks a child a
round, so a round costs milliseconds; the code is the appliance's own, only the hub process runs inside the child.
Prints one JSON object: how many rounds were cut off, how many completed. Exits 1 at the first broken promise.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spark_llm import config
from spark_llm.errors import SparkLlmError
from spark_llm.store import Request, Store, bundle, hub, unbundle
from spark_llm.store.fetch import Fetch
from spark_llm.store.hashing import hash_file
from spark_llm.store.layout import ModelFolder
from spark_llm.store.worker import Message

MODEL = "org/name"


class Collected(hub.Output):
    """Events in a list."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, event: str, **values: object) -> None:
        self.messages.append({"event": event, **values})


def talk(
    request: Message, *, stall_timeout_s: float, xet: bool, keep_open: int
) -> Iterator[Message]:
    """A hub process's work without its process."""
    del stall_timeout_s, xet, keep_open
    output = Collected()
    hub.serve(request, output)
    yield from (message for message in output.messages if message["event"] != "end")


def check(root: Path) -> bool:
    """Every snapshot that ``locate`` gives out is complete and right to the last byte; whether there is one."""
    store = Store(root)
    visible = False
    for commit in ModelFolder(root, MODEL).commits():
        snapshot = store.locate(MODEL, commit)
        if snapshot is None:
            continue
        visible = True
        for file in store.receipt(MODEL, commit).files:
            if not file.accepts(hash_file(snapshot / file.path)):
                raise SystemExit(f"{snapshot / file.path} is visible and wrong")
    return visible


def in_child(work: Callable[[], object], delay: float) -> bool:
    """Run ``work`` in a child and kill it after ``delay`` seconds; whether it came to its end before."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except SparkLlmError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(1)
        os._exit(0)
    time.sleep(delay)  # the random moment is the point
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a child failed")
    return os.WIFEXITED(status)


def damage(root: Path, chance: random.Random) -> None:
    """Spoil one file of the snapshot, as a bad disk would, and let verify find it."""
    folder = ModelFolder(root, MODEL)
    store = Store(root)
    snapshot = folder.snapshot(folder.commits()[0])
    victim = snapshot / chance.choice(store.receipt(MODEL, snapshot.name).files).path
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    store.verify(MODEL, snapshot.name)


def main(endpoint: str, folder: Path, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    root = folder / "store"
    settings = config.Store(endpoint=endpoint, reserve_bytes=0, backoff_s=0.01, xet=False)
    request = Request(str(root), MODEL, **settings.model_dump())

    def pull() -> object:
        return Fetch(request, lambda _: None, talk).run()

    def import_bundle() -> object:
        with carried.open("rb") as stream, unbundle.opened(stream, carried.name) as opened:
            return opened.receive(root, reserve_bytes=0)

    began = time.monotonic()
    child = os.fork()
    if child == 0:
        pull()
        os._exit(0)
    os.waitpid(child, 0)
    if not check(root):
        raise SystemExit("the first pull did not come to its end")
    longest = time.monotonic() - began
    carried = folder / "bundle"
    bundle.export(Store(root), MODEL, "", carried)
    counts = {"killed": 0, "completed": 0, "visible": 0}
    for turn in range(rounds):
        visible = check(root)
        if visible and turn % 3 == 0:
            damage(root, chance)
        elif visible:
            Store(root).remove(MODEL)
        importing = turn % 5 == 0

        def work(importing: bool = importing) -> object:
            return import_bundle() if importing else pull()

        done = in_child(work, chance.uniform(0, longest))
        counts["completed" if done else "killed"] += 1
        counts["visible"] += check(root)
    pull()
    if not check(root) or not Store(root).verify(MODEL, full=True).ok:
        raise SystemExit("the last pull did not mend what the kills left")
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
