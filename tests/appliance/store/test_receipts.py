"""Receipts, plans, locks and retries as pure values: properties that hold for all of them.

Over 400 lines because the properties share their strategies, which would otherwise stand twice.
"""

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spark_llm.errors import ConfigError, RefusedError, SparkLlmError, TryAgainError
from spark_llm.reason import Reason
from spark_llm.store import plan, receipt, snapshots
from spark_llm.store.hashing import GIT_LIMIT, Hasher, hash_file, hash_files
from spark_llm.store.layout import Incoming, ModelFolder, folder_name
from spark_llm.store.lock import BusyError, Lock, take
from spark_llm.store.progress import (
    Failure,
    Meter,
    Note,
    Progress,
    Result,
    decode,
    duration,
    encode,
)
from spark_llm.store.receipt import Receipt, RemoteFile
from spark_llm.store.stamp import Stamp
from spark_llm.store.worker import Message, RetryPolicy, StalledError, retrying

ON_DISK = settings(deadline=None, max_examples=50)
"""For properties of files: the disk decides how long they take."""
HEX = "0123456789abcdef"
STAMPS = st.builds(
    Stamp,
    st.integers(0, 2**63),
    st.integers(0, 2**63),
    st.integers(0, 2**63),
    st.text(HEX, min_size=64, max_size=64),
)
NAMES = st.lists(st.sampled_from(["a", "b", "c.safetensors", "d"]), min_size=1, max_size=3).map(
    "/".join
)
REMOTE = st.builds(
    lambda path, size, digest: RemoteFile(path, size, sha256=digest if len(digest) == 64 else "",
                                          git_sha1=digest if len(digest) == 40 else ""),
    NAMES, st.integers(0, 2**63),
    st.one_of(st.text(HEX, min_size=64, max_size=64), st.text(HEX, min_size=40, max_size=40)),
)  # fmt: skip
RECEIPTS = st.builds(
    Receipt,
    model=st.just("org/name"), commit=st.text(HEX, min_size=40, max_size=40), revision=st.just("main"),
    source=st.sampled_from(["hub", "bundle"]), verified_at=st.floats(0, 2e9),
    files=st.lists(REMOTE, max_size=4).map(tuple), stamps=st.dictionaries(NAMES, STAMPS, max_size=4),
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["format", "files", "stamps", "model", "path", "size"]),
            inner,
            max_size=4,
        )
    ),
)


@given(RECEIPTS)
def test_a_receipt_survives_its_file(proof: Receipt) -> None:
    """Written and read back, a receipt is the same."""
    assert receipt.parse(json.loads(json.dumps(proof.to_json()))) == proof


@given(JSON)
def test_no_json_at_all_breaks_the_reader(value: object) -> None:
    """Whatever a damaged receipt holds, it is a receipt or none, never an exception."""
    assert receipt.parse(value) is None or isinstance(receipt.parse(value), Receipt)


@ON_DISK
@given(RECEIPTS, st.integers(0, 400))
def test_a_torn_receipt_is_none(proof: Receipt, cut: int) -> None:
    """A receipt cut anywhere vouches for nothing."""
    text = json.dumps(proof.to_json())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".spark-llm").mkdir()
        (Path(folder) / receipt.RECEIPT).write_text(text[: min(cut, len(text) - 1)])
        assert receipt.read(Path(folder)) is None


@given(STAMPS, STAMPS)
def test_a_stamp_matches_only_the_same_file(one: Stamp, other: Stamp) -> None:
    """Size, time and inode must all agree; the hash is what the stamp stands for, not what it compares."""
    same = (one.size, one.mtime_ns, one.inode) == (other.size, other.mtime_ns, other.inode)
    assert one.matches(other) == same


@ON_DISK
@given(st.dictionaries(NAMES, st.binary(max_size=50), min_size=1, max_size=4), st.data())
def test_a_receipt_suspects_exactly_what_changed(
    contents: dict[str, bytes], data: st.DataObject
) -> None:
    """Files that were rewritten, removed or never stamped are suspects, and no others are."""
    contents = {name.replace("/", "-"): content for name, content in contents.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stamps, files = {}, []
        for path, content in contents.items():
            (folder / path).write_bytes(content)
            digests = hash_file(folder / path)
            stamps[path] = Stamp.of(folder / path)
            files.append(RemoteFile(path, digests.size, git_sha1=digests.git_sha1))
        proof = Receipt("a", "0" * 40, "main", "hub", 0.0, tuple(files), stamps)
        assert proof.suspects(folder) == []
        changed = data.draw(st.sets(st.sampled_from(sorted(contents))))
        for path in changed:
            match data.draw(st.sampled_from(["remove", "grow", "touch", "forget"])):
                case "remove":
                    (folder / path).unlink()
                case "grow":
                    (folder / path).write_bytes(contents[path] + b"x")
                case "touch":
                    os.utime(folder / path, ns=(1, 1))
                case _:
                    proof = proof.stamped({}, distrusted=[path])
        assert {file.path for file in proof.suspects(folder)} == changed


@ON_DISK
@given(st.lists(st.tuples(st.sampled_from("abc"), STAMPS), max_size=6), st.integers(0, 30))
def test_a_torn_journal_loses_its_last_line_only(
    entries: list[tuple[str, Stamp]], torn: int
) -> None:
    """A crash in the middle of a line costs that line; the last word on each file counts."""
    with tempfile.TemporaryDirectory() as folder:
        incoming = Incoming(Path(folder))
        for path, stamp in entries:
            snapshots.note(incoming, {path: stamp})
        incoming.own.mkdir(exist_ok=True)
        with incoming.journal.open("a") as stream:
            stream.write('{"path": "a", "size": 1, "mtime_ns": 2, "ino'[:torn])
        assert snapshots.read_journal(incoming) == dict(entries)


@given(st.text(max_size=30))
def test_any_model_name_stays_inside_the_store(name: str) -> None:
    """A name is refused or names one folder right below the root, different for different names."""
    try:
        folder = folder_name(name)
    except ConfigError:
        return
    assert Path("/root", folder).resolve().parent == Path("/root")
    assert folder.replace("--", "/") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/",
        "/a",
        "a/b/c",
        "..",
        "a/..",
        "a--b/c",
        "a/b@",
        ".a/b",
        "a b/c",
        "a/b\n",
        "a/" + "b" * 97,
        "é/a",
    ],
)
def test_names_that_are_none_are_refused(name: str) -> None:
    """What could leave the store or mean two models is no name."""
    with pytest.raises(ConfigError):
        plan.split_name(name)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=3))
def test_accepted_paths_stay_inside_the_snapshot(parts: list[str]) -> None:
    """Whatever a repository calls its files: refused, or below the snapshot and outside our folder."""
    path = "/".join(parts)
    try:
        plan.check_paths([RemoteFile(path, 0, git_sha1="0" * 40)])
    except RefusedError as error:
        assert error.reason is Reason.MODEL_UNSAFE  # noqa: PT017  refused or inside: both are right
        return
    resolved = Path("/snapshot", path).resolve()
    assert resolved.is_relative_to("/snapshot")
    assert resolved != Path("/snapshot")
    assert resolved.parts[2] != receipt.OWN_FOLDER


def test_paths_that_hit_each_other_are_refused() -> None:
    """One name twice, or a file where another needs a folder, cannot both be written."""
    for paths in (["a", "a"], ["a", "a/b"], ["a/b/c", "a/b"]):
        with pytest.raises(RefusedError):
            plan.check_paths([RemoteFile(path, 0, git_sha1="0" * 40) for path in paths])


@given(st.integers(0, 2**50), st.integers(0, 2**50), st.integers(0, 2**40))
def test_the_disk_check_is_exact(needed: int, free: int, reserve: int) -> None:
    """A fetch is refused exactly when it would cut into the reserve; one that needs nothing never is."""
    if needed and needed + reserve > free:
        with pytest.raises(RefusedError) as caught:
            plan.check_disk("m", needed=needed, free=free, reserve=reserve)
        assert caught.value.reason is Reason.NO_DISK
    else:
        plan.check_disk("m", needed=needed, free=free, reserve=reserve)


EVENTS = st.one_of(
    st.builds(Note, st.text(), st.sampled_from(list(Reason)).map(str)),
    st.builds(
        Progress,
        st.just("fetching"),
        st.integers(0, 2**60),
        st.integers(0, 2**60),
        st.floats(0, 1e12),
    ),
    st.builds(
        Failure,
        st.sampled_from(list(Reason)).map(str),
        st.text(),
        st.text(),
        st.sampled_from([1, 2, 3, 75]),
    ),
    st.builds(
        Result,
        st.text(),
        st.text(),
        st.text(),
        st.integers(0),
        st.integers(0),
        st.integers(0),
        st.floats(0, 1e6),
    ),
)


@given(EVENTS)
def test_an_event_is_one_line_and_comes_back(event: Note | Progress | Failure | Result) -> None:
    """Events travel as lines of JSON without loss; a failure becomes the exception it stands for."""
    line = encode(event)
    assert "\n" not in line
    assert decode(line) == event
    if isinstance(event, Failure):
        error = event.error()
        assert (error.exit_code, error.reason) == (event.exit_code, event.reason)


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"event": "other"}', '{"event": "note"}'])
def test_a_line_that_is_no_event_is_a_value_error(line: str) -> None:
    """A foreign line on the pipe has one kind of exception."""
    with pytest.raises(ValueError):  # noqa: PT011  JSON's own is one too
        decode(line)


@ON_DISK
@given(st.binary(max_size=2000), st.integers(1, 700))
def test_hashes_do_not_depend_on_blocks(content: bytes, block: int) -> None:
    """Fed in any pieces, a content has git's and sha256sum's hashes."""
    hasher = Hasher(len(content))
    for at in range(0, len(content), block):
        hasher.update(content[at : at + block])
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        assert hash_file(Path(file.name)) == hasher.digests()


def test_git_and_sha256sum_agree(tmp_path: Path) -> None:
    """The two hashes are those of the tools everybody has."""
    path = tmp_path / "file"
    path.write_bytes(b"content\n" * 1000)
    digests = hash_file(path)
    git = subprocess.run(
        ["git", "hash-object", str(path)], check=True, capture_output=True, text=True
    ).stdout
    sha = subprocess.run(
        ["sha256sum", str(path)], check=True, capture_output=True, text=True
    ).stdout
    assert (digests.git_sha1, digests.sha256) == (git.strip(), sha.split()[0])


def test_a_large_file_gets_no_git_id(tmp_path: Path) -> None:
    """Shards are hashed once, not twice; a receipt that wants a git id of one does not accept it."""
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.truncate(GIT_LIMIT + 1)
    digests = hash_file(path)
    assert digests.git_sha1 == ""
    assert not RemoteFile("file", GIT_LIMIT + 1, git_sha1="0" * 40).accepts(digests)
    assert RemoteFile("file", GIT_LIMIT + 1, sha256=digests.sha256).accepts(digests)


def test_a_file_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path) -> None:
    """Errors come as results, one a file."""
    (tmp_path / "good").write_bytes(b"x")
    found = dict(hash_files([tmp_path / "good", tmp_path / "gone"]))
    assert isinstance(found[tmp_path / "gone"], FileNotFoundError)
    assert not isinstance(found[tmp_path / "good"], OSError)


HOLDERS = st.lists(st.booleans(), min_size=1, max_size=5)


@ON_DISK
@given(HOLDERS)
def test_a_lock_admits_readers_or_one_writer(shared: list[bool]) -> None:
    """In any order of arrival: an exclusive holder is alone, shared ones are together."""
    with tempfile.TemporaryDirectory() as folder:
        held: list[tuple[AbstractContextManager[int], bool]] = []
        path = Path(folder) / "lock"
        for wants_shared in shared:
            manager: AbstractContextManager[int] = Lock(path, "thing").hold(
                "test", shared=wants_shared
            )
            may = not held or (wants_shared and all(kind for _, kind in held))
            if may:
                manager.__enter__()
                held.append((manager, wants_shared))
            else:
                with pytest.raises(BusyError):
                    manager.__enter__()
        for holder, _ in held:
            holder.__exit__(None, None, None)
        with Lock(path, "thing").hold("test"):
            assert Lock(path, "thing").held() is not None
        assert Lock(path, "thing").held() is None


def test_a_killed_owner_leaves_no_lock(tmp_path: Path) -> None:
    """Kill -9 of the owner frees the lock; what the file still says is ignored."""
    script = (
        "import sys, time; from pathlib import Path; from spark_llm.store.lock import Lock\n"
        f"with Lock(Path({str(tmp_path / 'lock')!r}), 'thing').hold('pull'):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    lock = Lock(tmp_path / "lock", "thing")
    owner = lock.held()
    assert owner is not None
    assert (owner.pid, owner.reason) == (process.pid, "pull")
    with pytest.raises(BusyError, match=rf"process {process.pid} \(pull\)"), lock.hold("rm"):
        pass
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    with lock.hold("rm"):
        pass
    assert lock.held() is None


@pytest.mark.parametrize("shared", [True, False])
def test_who_looks_at_a_lock_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Lists and doctor look at locks at any moment; a start in the middle of that look gets its lock."""
    lock = Lock(tmp_path / "lock", "thing")
    with lock.hold("made"):
        pass
    taken: list[int] = []
    close = os.close

    def start_meanwhile(looked_with: int) -> None:
        monkeypatch.setattr(os, "close", close)
        with lock.hold("serving", shared=shared) as descriptor:
            taken.append(descriptor)
        close(looked_with)

    monkeypatch.setattr(os, "close", start_meanwhile)
    assert lock.held() is None
    assert len(taken) == 1


def test_an_owner_who_lets_others_in_is_still_seen(tmp_path: Path) -> None:
    """A lock that was taken alone and then shared admits readers, refuses a writer, and counts as held."""
    lock = Lock(tmp_path / "lock", "thing")
    with lock.hold("alone") as descriptor:
        take(descriptor, shared=True)
        with lock.hold("reader", shared=True):
            pass
        with pytest.raises(BusyError), lock.hold("rm"):
            pass
        assert lock.held() is not None


def test_a_lock_file_is_for_everybody_who_may_write_its_folder(tmp_path: Path) -> None:
    """A service with a strict umask makes locks that its group can take, and keeps its umask while it holds them."""
    root = tmp_path / "store"
    root.mkdir()
    root.chmod(0o2775)
    before = os.umask(0o077)
    try:
        with Lock(root / ".locks" / "lock", "thing").hold("serving", shared=True):
            assert os.umask(0o077) == 0o077
        assert stat.S_IMODE((root / ".locks" / "lock").stat().st_mode) == 0o664
        assert stat.S_IMODE((root / ".locks").stat().st_mode) == 0o2775
    finally:
        os.umask(before)


OUTCOME = st.sampled_from(["ok", "nothing", "bytes", "stall", "fatal", "corrupt"])


@given(st.lists(OUTCOME, max_size=12), st.integers(1, 4))
def test_retries_end(outcomes: list[str], attempts: int) -> None:
    """Whatever happens: success ends it, so does a final cause, so do enough tries in a row without a byte."""
    tries: list[bool] = []
    waits: list[float] = []

    def attempt(xet: bool) -> Iterator[Message]:
        outcome = outcomes[len(tries)] if len(tries) < len(outcomes) else "nothing"
        tries.append(xet)
        if outcome in ("bytes", "corrupt"):
            yield {"event": "bytes"}
        if outcome == "stall":
            raise StalledError("silent", reason=Reason.STALLED)
        if outcome == "corrupt":
            yield {"event": "corrupt", "path": "x"}
        elif outcome != "ok":
            reason = Reason.NO_DISK if outcome == "fatal" else Reason.NETWORK
            yield {
                "event": "failed",
                "path": "x",
                "reason": reason,
                "message": "m",
                "retry": outcome != "fatal",
            }

    policy = RetryPolicy(attempts, 1.0, xet=True)
    try:
        list(retrying(attempt, policy, lambda *_: None, waits.append))
        assert outcomes[len(tries) - 1] == "ok"
    except TryAgainError:
        assert all(
            outcome in ("nothing", "stall")
            for outcome in outcomes[len(tries) - attempts : len(tries)]
        )
    except SparkLlmError as error:
        assert error.reason is Reason.NO_DISK  # noqa: PT017  which end it comes to is the question
        assert outcomes[len(tries) - 1] == "fatal"
    assert tries == [True] + [False] * (len(tries) - 1)
    assert all(1.0 <= wait <= 60.0 for wait in waits)
    assert len(waits) == len(tries) - 1


def test_the_hubs_wait_is_respected_up_to_a_minute() -> None:
    """Retry-After beats the back-off, and no hub makes us wait for ever."""
    policy = RetryPolicy(5, 1.0, xet=False)
    assert [policy.wait(n, 0.0) for n in (1, 2, 3, 10)] == [2.0, 4.0, 8.0, 60.0]
    assert policy.wait(1, 7.0) == 7.0
    assert policy.wait(1, 3600.0) == 60.0


def test_the_rate_covers_the_last_ten_seconds() -> None:
    """An old burst does not promise an arrival that will not come."""
    now = iter([0.0, 1.0, 11.0, 21.0])
    meter = Meter(lambda: next(now))
    assert meter.rate(0) == 0.0
    assert meter.rate(1000) == 1000.0
    assert meter.rate(1100) == 10.0
    assert meter.rate(1100) == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    """Times left are short and have units."""
    assert duration(seconds) == text


def test_leftovers_of_other_models_are_not_ours(tmp_path: Path) -> None:
    """A folder of one model never lists another's commits."""
    one, other = ModelFolder(tmp_path, "org/a"), ModelFolder(tmp_path, "org/a2")
    one.snapshot("0" * 40).mkdir(parents=True)
    assert one.commits() == ["0" * 40]
    assert other.commits() == []
