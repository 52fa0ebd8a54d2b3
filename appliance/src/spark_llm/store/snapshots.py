"""The steps that make a snapshot visible, take it back, and remember where it came from."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from spark_llm.errors import RefusedError
from spark_llm.reason import Reason
from spark_llm.store import durable, plan, receipt
from spark_llm.store.layout import Incoming, ModelFolder
from spark_llm.store.receipt import RECEIPT, Receipt, RemoteFile
from spark_llm.store.stamp import Stamp


def publish(folder: ModelFolder, proof: Receipt) -> Path:
    """Make ``incoming`` the snapshot of ``proof.commit``: receipt, tidy, flush, one rename.

    Raises:
        OSError: the store cannot be written; the snapshot is not visible then.
    """
    incoming = folder.incoming(proof.commit)
    receipt.write(incoming.path, proof)
    wanted = {file.path for file in proof.files} | {RECEIPT}
    for current, _, names in os.walk(incoming.path, topdown=False):
        for name in names:
            path = Path(current) / name
            if str(path.relative_to(incoming.path)) not in wanted:
                path.unlink()
        if not any(Path(current).iterdir()):
            Path(current).rmdir()
        else:
            durable.sync_folder(Path(current))
    snapshot = folder.snapshot(proof.commit)
    incoming.path.rename(snapshot)
    durable.sync_folder(folder.path)
    durable.sync_folder(folder.root)  # the model's folder may be as new
    return snapshot


def unpublish(folder: ModelFolder, commit: str) -> None:
    """Take the snapshot back to ``incoming``, so that only what is wrong is fetched again.

    Raises:
        BusyError: somebody reads it.
    """
    with folder.use_lock.hold("repair"):
        incoming = folder.incoming(commit).path
        incoming.parent.mkdir(exist_ok=True)
        if incoming.exists():
            durable.remove_tree(incoming)
        folder.snapshot(commit).rename(incoming)
        durable.sync_folder(folder.path)


def quarantine(folder: ModelFolder, commit: str, path: str, bad: Path) -> None:
    """Put a file with wrong content aside; the last bad one of each name is kept."""
    target = folder.quarantine(commit) / path
    target.parent.mkdir(parents=True, exist_ok=True)
    bad.replace(target)


def siblings(folder: ModelFolder, wanted: Iterable[RemoteFile]) -> dict[str, Path]:
    """Files of other snapshots of the model with the content that ``wanted`` files must have, by wanted path."""
    known: dict[str, Path] = {}
    for commit in folder.commits():
        proof = receipt.read(folder.snapshot(commit))
        for file in proof.files if proof else ():
            known[file.sha256 or file.git_sha1] = folder.snapshot(commit) / file.path
    found = {file.path: known.get(file.sha256 or file.git_sha1) for file in wanted}
    return {
        path: source.resolve()
        for path, source in found.items()
        if source is not None and source.is_file()
    }


def read_refs(folder: ModelFolder) -> dict[str, str]:
    """Branches and tags, and the commits they stood for when the hub was last asked."""
    value = durable.read_json(folder.refs)
    if not isinstance(value, dict):
        return {}
    return {
        name: entry["commit"]
        for name, entry in value.items()
        if isinstance(entry, dict) and plan.is_commit(str(entry.get("commit")))
    }


def recorded_commit(folder: ModelFolder, revision: str) -> str:
    """The commit that ``revision`` is, or stood for when it was last asked; empty if unknown."""
    return revision if plan.is_commit(revision) else read_refs(folder).get(revision, "")


def record(folder: ModelFolder, revision: str, commit: str) -> None:
    """Remember what a branch or tag stands for; a commit needs no memory."""
    if not plan.is_commit(revision):
        old = durable.read_json(folder.refs)
        refs = old if isinstance(old, dict) else {}
        durable.write_json(folder.refs, {**refs, revision: {"commit": commit, "at": time.time()}})


def read_plan(incoming: Incoming) -> tuple[RemoteFile, ...]:
    """The files an earlier try wanted; none if it left no list."""
    if proof := receipt.read(incoming.path):
        return proof.files
    value = durable.read_json(incoming.plan)
    try:
        return tuple(RemoteFile.from_json(item) for item in value["files"])
    except (KeyError, TypeError, ValueError):
        return ()


def write_plan(incoming: Incoming, files: tuple[RemoteFile, ...]) -> None:
    """Keep the list, so that the next try needs no hub to know what is missing."""
    incoming.own.mkdir(parents=True, exist_ok=True)
    durable.write_json(incoming.plan, {"files": [file.to_json() for file in files]})


def read_journal(incoming: Incoming) -> dict[str, Stamp]:
    """Stamps of the files that earlier tries verified; a torn last line is left out."""
    stamps: dict[str, Stamp] = {}
    try:
        lines = incoming.journal.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return stamps
    for line in lines:
        try:
            value = json.loads(line)
            stamps[str(value["path"])] = Stamp.from_json(value)
        except (ValueError, KeyError, TypeError):
            continue
    return stamps


def note(incoming: Incoming, stamps: Mapping[str, Stamp]) -> None:
    """Add verified files to the journal, durably. Not for use by several threads at once."""
    incoming.own.mkdir(parents=True, exist_ok=True)
    with incoming.journal.open("a", encoding="utf-8") as stream:
        for path, stamp in stamps.items():
            stream.write(json.dumps({"path": path, **stamp.to_json()}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def unwritable(path: Path, error: OSError) -> RefusedError:
    """The error for a store that cannot be written."""
    return RefusedError(
        f"cannot write the model store at {path}: {error.strerror}",
        reason=Reason.UNWRITABLE_DIRECTORY,
        hint="Run as the service's user or a member of its group, or set paths.state; `spark-llm doctor` says more.",
    )
