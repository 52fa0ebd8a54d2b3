"""The compile caches: namespaces, seals, and what happens to what does not match."""

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from spark_llm import manifest as manifests
from spark_llm.caches import SCRATCH_LIMIT, CacheRoot, Entry, Namespace, State, to_prune, variables
from spark_llm.errors import ConfigError
from spark_llm.reason import Reason
from spark_llm.store.lock import Lock

from tests.appliance.service import wait_for

MANIFEST = manifests.build(engine="e", kernels="k", model="org/name", model_commit="0" * 40)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is too long for the engine's sockets
        yield CacheRoot(Path(folder)).namespace(MANIFEST)


def fill(namespace: Namespace) -> None:
    namespace.prepare()
    for name in (
        "triton/cache/a/kernel.cubin",
        "triton/cache/a/kernel.json",
        "vllm/cache/x/graph.py",
    ):
        path = namespace.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)


def restore_stamp(path: Path, status: os.stat_result) -> None:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_first_start_finds_nothing(namespace: Namespace) -> None:
    """A namespace that was never used is new, and prepare makes every folder that a variable names."""
    assert namespace.prepare().state is State.NEW
    table = variables()
    environment = namespace.environment()
    assert set(environment) == {*table["folders"], *table["values"], *table["scratch"]}
    for name in (*table["folders"], *table["scratch"]):
        assert Path(environment[name]).is_dir(), name
        assert Path(environment[name]).is_relative_to(namespace.path), name


def test_sealed_caches_are_valid_at_the_next_start(namespace: Namespace) -> None:
    """What was sealed and not touched is kept as it is."""
    fill(namespace)
    assert namespace.seal() == 3
    verdict = namespace.prepare()
    assert (verdict.state, verdict.files) == (State.VALID, 3)


def test_an_unsealed_cache_is_discarded(namespace: Namespace) -> None:
    """Files of a start that never became ready are not trusted."""
    fill(namespace)
    verdict = namespace.prepare()
    assert verdict.state is State.DISCARDED
    assert "never sealed" in verdict.message
    assert not list(namespace.data.rglob("*.cubin"))


def test_files_written_after_the_seal_are_removed(namespace: Namespace) -> None:
    """A crash after the seal leaves half-written files; the sealed state comes back without losing the rest."""
    fill(namespace)
    namespace.seal()
    (namespace.data / "vllm/cache/half-written").write_bytes(b"x")
    verdict = namespace.prepare()
    assert (verdict.state, verdict.files) == (State.RESTORED, 3)
    assert verdict.removed == ("vllm/cache/half-written",)
    assert namespace.check().state is State.VALID


@pytest.mark.parametrize("damage", ["changed", "missing", "replaced"])
def test_a_damaged_component_is_discarded_alone(namespace: Namespace, damage: str) -> None:
    """A sealed file that changed or went takes its component with it, and no other."""
    fill(namespace)
    namespace.seal()
    victim = namespace.data / "triton/cache/a/kernel.cubin"
    if damage == "changed":
        victim.write_bytes(b"other")
    elif damage == "missing":
        victim.unlink()
    else:
        (other := victim.with_suffix(".new")).write_bytes(
            b"same size?".ljust(victim.stat().st_size)
        )
        other.replace(victim)
    verdict = namespace.prepare()
    assert verdict.state is State.PARTLY_DISCARDED
    assert "triton" in verdict.message
    assert verdict.removed == ("triton",)
    assert (namespace.data / "vllm/cache/x/graph.py").is_file()
    assert not list((namespace.data / "triton").rglob("kernel.*"))


def test_a_touched_file_with_the_same_content_is_kept(namespace: Namespace) -> None:
    """A new mtime alone makes the file be hashed again, and the hash decides."""
    fill(namespace)
    namespace.seal()
    os.utime(namespace.data / "triton/cache/a/kernel.cubin", ns=(1, 1))
    assert namespace.prepare().state is State.VALID


def test_silent_corruption_is_found_by_a_full_check(namespace: Namespace) -> None:
    """Content changed behind an unchanged stamp passes the quick check and fails the full one."""
    fill(namespace)
    namespace.seal()
    victim = namespace.data / "triton/cache/a/kernel.cubin"
    status = victim.stat()
    with victim.open("r+b") as stream:
        stream.write(b"X")
    restore_stamp(victim, status)
    assert namespace.check().state is State.VALID
    assert namespace.check(full=True).state is State.PARTLY_DISCARDED


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"layout": 1}', '{"layout": 1, "manifest": "other", "files": {}}']
)
def test_an_unreadable_seal_counts_as_none(namespace: Namespace, text: str) -> None:
    """A torn seal, or one of another manifest, vouches for nothing."""
    fill(namespace)
    namespace.seal()
    (namespace.path / "seal.json").write_text(text)
    assert namespace.prepare().state is State.DISCARDED


def test_another_manifest_gets_another_namespace(tmp_path: Path) -> None:
    """A new driver, flag or model commit never sees the caches of the old one."""
    root = CacheRoot(tmp_path)
    paths = {
        root.namespace(changed).path
        for changed in (
            MANIFEST,
            replace(MANIFEST, driver="580.95"),
            replace(MANIFEST, flags=("--enforce-eager",)),
            replace(MANIFEST, model_commit="1" * 40),
        )
    }
    assert len(paths) == 4


def test_a_scratch_folder_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    """The error comes before the engine's own, which would not name the cause."""
    deep = tmp_path / ("d" * SCRATCH_LIMIT)
    with pytest.raises(ConfigError) as caught:
        CacheRoot(deep).namespace(MANIFEST).environment()
    assert caught.value.reason is Reason.SOCKET_PATH_TOO_LONG


def test_clear_spares_what_is_in_use(tmp_path: Path) -> None:
    """An engine's own namespace is never pulled from under it."""
    root = CacheRoot(tmp_path)
    used, idle = root.namespace(MANIFEST), root.namespace(replace(MANIFEST, gpu="GB10"))
    fill(used)
    fill(idle)
    with used.hold("serving"):
        assert [entry.name for entry in root.clear()] == [idle.path.name]
        assert [entry.in_use for entry in root.entries()] == [True]
    assert [entry.name for entry in root.clear()] == [used.path.name]
    assert root.entries() == []


def test_a_namespace_in_use_is_taken_as_it_is(namespace: Namespace) -> None:
    """A second engine of the same manifest finds the folders and does not empty the scratch folder of the first."""
    fill(namespace)
    namespace.seal()
    with namespace.hold("serving") as first:
        assert first.state is State.VALID
        mine = Path(namespace.environment()["TMPDIR"]) / "socket"
        mine.touch()
        fresh = namespace.data / "vllm/cache/just-compiled"
        fresh.touch()
        with Namespace(namespace.path, MANIFEST).hold("serving too") as second:
            assert second.state is State.SHARED
            assert mine.exists()
            assert fresh.exists()
    with namespace.hold("serving") as third:
        assert third.state is State.RESTORED
        assert not mine.exists()


def test_engines_that_start_at_once_share_a_namespace(namespace: Namespace) -> None:
    """Of many starts at the same time each gets the namespace, with all its folders; one of them prepares it."""
    all_hold = threading.Barrier(8)

    def start(_: int) -> State:
        with Namespace(namespace.path, MANIFEST).hold("serving") as verdict:
            assert Path(namespace.environment()["TMPDIR"]).is_dir()
            all_hold.wait(30)
            return verdict.state

    with ThreadPoolExecutor(8) as pool:
        states = list(pool.map(start, range(8)))
    assert sorted(states) == [State.NEW, *[State.SHARED] * 7]


def test_a_namespace_removed_while_a_start_waits_is_made_again(namespace: Namespace) -> None:
    """A start that finds the namespace being removed waits and gets a whole one under a lock that counts."""
    fill(namespace)
    root = CacheRoot(namespace.path.parent)
    with ExitStack() as held, ThreadPoolExecutor(1) as pool:
        with Lock(namespace.path / "lock", "cache").hold("remove"):
            waiting = pool.submit(held.enter_context, namespace.hold("serving"))
            wait_for(lambda: _is_waited_for(namespace.path / "lock"), 30, lambda: "nobody waits")
            shutil.rmtree(namespace.path)
        assert waiting.result(30).state is State.SHARED
        assert Path(namespace.environment()["TMPDIR"]).is_dir()
        assert not root.remove(namespace.path.name)
    assert root.remove(namespace.path.name)


def _is_waited_for(path: Path) -> bool:
    """Whether somebody is blocked on this lock, as proc_locks(5) shows it."""
    inode = f":{path.stat().st_ino} "
    return any(
        "->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines()
    )


def test_prune_removes_the_least_recently_used_first() -> None:
    """Pruning stops at the limit, keeps the newest and skips what is in use."""
    entries = [
        Entry(f"{n:016x}", 10, 1, float(n), sealed=True, in_use=n == 1, model="", engine="")
        for n in range(6)
    ]
    shuffled = [entries[n] for n in (3, 0, 5, 1, 4, 2)]
    assert [entry.used for entry in to_prune(shuffled, 35, 1)] == [0.0, 2.0, 3.0]
    assert to_prune(shuffled, 60, 1) == []
    assert [entry.used for entry in to_prune(shuffled, 0, 2)] == [0.0, 2.0, 3.0]


def test_prune_on_disk_reaches_the_limit(tmp_path: Path) -> None:
    """What prune returns is gone, and the newest namespace stays even above the limit."""
    root = CacheRoot(tmp_path)
    for gpu in ("a", "b", "c"):
        fill(root.namespace(replace(MANIFEST, gpu=gpu)))
    newest = root.entries()[0].name
    assert len(root.prune(max_bytes=0)) == 2
    assert [entry.name for entry in root.entries()] == [newest]
