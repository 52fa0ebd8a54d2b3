"""Bundles: a model in one file, and everything a bad file can try.

Over 400 lines because every bad file is made by the same writer of members and headers.
"""

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from spark_llm.errors import SparkLlmError
from spark_llm.reason import Reason
from spark_llm.store import Store, durable, unbundle
from spark_llm.store.bundle import export
from spark_llm.store.hashing import hash_file

from tests.hub.pulls import FILES, MODEL, Puller, import_bundle

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def exported(pull: Puller, tmp_path: Path) -> Path:
    pull.hub.add(MODEL, FILES)
    pull()
    target = tmp_path / "model.tar.zst"
    export(pull.store, MODEL, "", target)
    return target


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other")


def test_a_bundle_carries_a_model_to_a_machine_without_a_network(
    exported: Path, pull: Puller, other: Store
) -> None:
    """What comes out on the other side is verified, found by name and equal."""
    proof = import_bundle(other.root, exported)
    assert other.locate(MODEL) is not None
    assert other.locate(MODEL, proof.commit) == other.locate(MODEL)
    assert other.verify(MODEL, full=True).ok
    assert proof.files == pull.store.receipt(MODEL).files
    assert [model.source for model in other.models()] == ["bundle"]


def test_a_bundle_is_the_same_every_time(exported: Path, pull: Puller, tmp_path: Path) -> None:
    """The checksum that export prints can be compared, so the bytes do not depend on the day."""
    _, digest = export(pull.store, MODEL, "", tmp_path / "again.tar.zst")
    assert digest == hash_file(exported).sha256
    assert (tmp_path / "again.tar.zst").read_bytes() == exported.read_bytes()


@pytest.mark.parametrize("there", [False, True])
def test_what_is_compared_is_what_is_imported(
    exported: Path, other: Store, tmp_path: Path, *, there: bool
) -> None:
    """A file that takes the bundle's place after it was opened changes nothing, and the wrong one stays invisible."""
    digest = hash_file(exported).sha256
    if there:
        import_bundle(other.root, exported)
    before = other.models()
    with (
        exported.open("rb") as stream,
        unbundle.opened(stream, "it", sha256="0" * 64) as bundle,
    ):
        (tmp_path / "evil").write_bytes(b"evil")
        (tmp_path / "evil").replace(exported)
        with pytest.raises(SparkLlmError, match=f"sha256 {digest}") as caught:
            bundle.receive(other.root, reserve_bytes=0)
    assert caught.value.reason is Reason.MODEL_CORRUPT
    assert other.models() == before
    assert other.commit(MODEL) == (before[0].commit if there else "")


def test_the_whole_file_is_compared(exported: Path, other: Store) -> None:
    """Bytes behind the archive count too, and the checksum may be written in capitals."""
    digest = hash_file(exported).sha256
    whole = exported.read_bytes()
    exported.write_bytes(whole + b"more")
    with pytest.raises(SparkLlmError, match="sha256"):
        import_bundle(other.root, exported, sha256=digest)
    exported.write_bytes(whole)
    import_bundle(other.root, exported, sha256=digest.upper())
    assert other.locate(MODEL) is not None


def test_a_mistyped_checksum_is_refused_at_once(exported: Path, other: Store) -> None:
    """Nobody waits for a comparison that cannot succeed."""
    with pytest.raises(SparkLlmError) as caught:
        import_bundle(other.root, exported, sha256="1234")
    assert caught.value.reason is Reason.BAD_REQUEST
    assert not other.root.exists()


def test_a_new_model_survives_a_power_cut(
    exported: Path, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the model's folder is on the disk, too, once the snapshot is visible."""
    synced: list[tuple[Path, bool]] = []

    def sync(folder: Path) -> None:
        synced.append((folder, other.locate(MODEL) is not None))

    monkeypatch.setattr(durable, "sync_folder", sync)
    import_bundle(other.root, exported)
    assert (other.root, True) in synced
    assert (other.root / "org--name", True) in synced


def test_importing_twice_changes_nothing(exported: Path, other: Store) -> None:
    """A model that is there stays as it is."""
    import_bundle(other.root, exported)
    first = other.models()
    import_bundle(other.root, exported)
    assert other.models() == first


def test_a_damaged_model_is_not_exported(pull: Puller, exported: Path, tmp_path: Path) -> None:
    """A bundle of a rotten model would spread the rot; nothing is written."""
    del exported
    weights = (pull.store.locate(MODEL) or Path()) / "model.safetensors"
    weights.write_bytes(b"X" + weights.read_bytes()[1:])
    with pytest.raises(SparkLlmError) as caught:
        export(pull.store, MODEL, "", tmp_path / "bad.tar.zst")
    assert caught.value.reason is Reason.MODEL_CORRUPT
    assert not list(tmp_path.glob("*bad*"))


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_an_export_that_cannot_be_put_in_place_leaves_nothing(
    pull: Puller, exported: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """What was written goes again, and the error is one of ours even if it cannot."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(error, "no", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(SparkLlmError, match="cannot write"):
            export(pull.store, MODEL, "", exported)
        assert not list(exported.parent.glob(f"{durable.TEMPORARY_PREFIX}*"))
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(SparkLlmError, match="cannot write"):
            export(pull.store, MODEL, "", exported)


def repack(bundle: Path, change: Callable[[Members], None]) -> None:
    """The bundle with its members changed."""
    with (
        bundle.open("rb") as stream,
        zstandard.ZstdDecompressor().stream_reader(stream) as unpacked,
    ):
        raw = unpacked.read()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        members: Members = [
            (member, (tar.extractfile(member) or io.BytesIO()).read()) for member in tar
        ]
    change(members)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in members:
            if member.isreg():
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    bundle.write_bytes(zstandard.ZstdCompressor().compress(out.getvalue()))


def index_of(members: Members, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads(members[0][1])
    change(index)
    members[0] = (members[0][0], json.dumps(index).encode())


def traversal(members: Members) -> None:
    def change(index: dict[str, Any]) -> None:
        index["files"][0]["path"] = "../../../evil"

    index_of(members, change)
    members[1][0].name = "files/../../../evil"


def model_traversal(members: Members) -> None:
    index_of(members, lambda index: index.update(model="../../evil"))


def symlink(members: Members) -> None:
    members[1][0].type, members[1][0].linkname = tarfile.SYMTYPE, "/etc/passwd"


def hardlink(members: Members) -> None:
    members[1][0].type, members[1][0].linkname = tarfile.LNKTYPE, "bundle.json"


def device(members: Members) -> None:
    members[1][0].type = tarfile.CHRTYPE


def linked_folder(members: Members) -> None:
    link = tarfile.TarInfo("files/tokenizer")
    link.type, link.linkname = tarfile.SYMTYPE, "/tmp"  # noqa: S108  the attack
    members.insert(1, (link, b""))


def unlisted(members: Members) -> None:
    members.append((tarfile.TarInfo("files/extra.py"), b"import os"))


def twice(members: Members) -> None:
    members.append((tarfile.TarInfo(members[1][0].name), members[1][1]))


def wrong_bytes(members: Members) -> None:
    at = next(n for n, (member, _) in enumerate(members) if member.name.endswith(".safetensors"))
    members[at] = (members[at][0], b"X" + members[at][1][1:])


def too_large(members: Members) -> None:
    members[1] = (members[1][0], members[1][1] + b"more")


def short(members: Members) -> None:
    members.pop()


def no_index(members: Members) -> None:
    members.pop(0)


def future(members: Members) -> None:
    index_of(members, lambda index: index.update(format=99))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (traversal, Reason.MODEL_UNSAFE),
        (model_traversal, Reason.NOT_FOUND),
        (symlink, Reason.MODEL_UNSAFE),
        (hardlink, Reason.MODEL_UNSAFE),
        (device, Reason.MODEL_UNSAFE),
        (linked_folder, Reason.MODEL_UNSAFE),
        (unlisted, Reason.MODEL_UNSAFE),
        (twice, Reason.MODEL_UNSAFE),
        (wrong_bytes, Reason.MODEL_CORRUPT),
        (too_large, Reason.MODEL_UNSAFE),
        (short, Reason.MODEL_INCOMPLETE),
        (no_index, Reason.MODEL_UNSAFE),
        (future, Reason.BAD_REQUEST),
    ],
)
def test_a_bad_bundle_is_refused(
    exported: Path, other: Store, tmp_path: Path, change: Callable[[Members], None], reason: Reason
) -> None:
    """Names, links, devices, sizes and content are all checked; nothing is visible and nothing lies outside."""
    repack(exported, change)
    before = {path for path in tmp_path.rglob("*") if other.root not in path.parents}
    with pytest.raises(SparkLlmError) as caught:
        import_bundle(other.root, exported)
    assert caught.value.reason is reason
    assert other.models() == []
    assert {path.name for path in other.root.glob("*")} <= {".locks"}
    assert {path for path in tmp_path.rglob("*") if other.root not in path.parents} - before <= {
        other.root
    }


def with_pickle(members: Members, content: bytes = b"\x80\x04evil") -> None:
    """Adds a pickle to the list and to the archive."""
    digest = hashlib.sha256(content).hexdigest()

    def change(index: dict[str, Any]) -> None:
        index["files"].append({"path": "model.bin", "size": len(content), "sha256": digest})

    index_of(members, change)
    members.append((tarfile.TarInfo("files/model.bin"), content))


def only_pickle(members: Members) -> None:
    with_pickle(members)
    members[:] = [member for member in members if not member[0].name.endswith(".safetensors")]

    def change(index: dict[str, Any]) -> None:
        index["files"] = [f for f in index["files"] if not f["path"].endswith(".safetensors")]

    index_of(members, change)


def test_pickles_need_a_word(exported: Path, other: Store) -> None:
    """A bundle whose weights are pickles is refused as a pull of them is, unless they are allowed."""
    repack(exported, only_pickle)
    with pytest.raises(SparkLlmError, match="pickles only") as caught:
        import_bundle(other.root, exported)
    assert caught.value.reason is Reason.MODEL_UNSAFE
    assert other.models() == []
    import_bundle(other.root, exported, allow_pickle=True)
    assert ((other.locate(MODEL) or Path()) / "model.bin").is_file()


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pickles_beside_safetensors_are_left_out(
    exported: Path, pull: Puller, other: Store, *, allow_pickle: bool
) -> None:
    """What a pull does not fetch an import does not keep, whatever its size."""
    repack(exported, lambda members: with_pickle(members, bytes(2**20)))
    proof = import_bundle(other.root, exported, allow_pickle=allow_pickle)
    assert proof.files == pull.store.receipt(MODEL).files
    assert not ((other.locate(MODEL) or Path()) / "model.bin").exists()


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    """The block that announces ``size`` bytes of ``kind``."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf()


def sparse_map(entries: int) -> bytes:
    """A file whose map of holes, as pax 1.0 has it, has ``entries`` entries."""
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    content = f"{entries}\n".encode() + b"0\n" * (2 * entries)
    announced = header(tarfile.XHDTYPE, len(records)) + records.ljust(512, b"\0")
    return announced + header(tarfile.REGTYPE, len(content)) + content


@pytest.mark.parametrize("at", ["first", "second"])
@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(header(tarfile.XHDTYPE, 2**26) + bytes(2**26), id="pax"),
        pytest.param(header(tarfile.XGLTYPE, 2**26) + bytes(2**26), id="global"),
        pytest.param(header(tarfile.GNUTYPE_LONGNAME, 2**26) + bytes(2**26), id="longname"),
        pytest.param(header(tarfile.REGTYPE, 2**26, "bundle.json") + bytes(2**26), id="index"),
        pytest.param(sparse_map(2**22), id="sparse"),
    ],
)
def test_a_small_file_cannot_fill_the_memory(
    exported: Path, other: Store, at: str, bomb: bytes
) -> None:
    """What a header claims, in front of the index or behind it, is refused before it is in memory."""
    with exported.open("rb") as stream:
        raw = zstandard.ZstdDecompressor().stream_reader(stream).read()
    second = 512 + -(-int(raw[124:135], 8) // 512) * 512
    start = raw[: second if at == "second" else 0]
    exported.write_bytes(zstandard.ZstdCompressor().compress(start + bomb + bytes(10240)))
    assert exported.stat().st_size < 2**16
    tracemalloc.start()
    try:
        with pytest.raises(SparkLlmError) as caught:
            import_bundle(other.root, exported)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert caught.value.reason is Reason.MODEL_UNSAFE
    assert other.models() == []


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"format": 1, "files": [{"path": "a", "size": 1e999}]}']
)
def test_an_index_that_is_no_list_is_no_bundle(exported: Path, other: Store, text: str) -> None:
    """JSON that no parser or number can hold is refused like any other nonsense."""

    def change(members: Members) -> None:
        members[0] = (members[0][0], text.encode())

    repack(exported, change)
    with pytest.raises(SparkLlmError, match="not a model bundle"):
        import_bundle(other.root, exported)


def test_long_names_are_carried(pull: Puller, other: Store, tmp_path: Path) -> None:
    """A name too long for a plain header, which takes a pax record of its own, arrives."""
    name = "/".join(["a" * 200] * 5)
    pull.hub.add(MODEL, {**FILES, name: b"deep"})
    pull()
    export(pull.store, MODEL, "", tmp_path / "deep")
    import_bundle(other.root, tmp_path / "deep")
    assert ((other.locate(MODEL) or Path()) / name).read_bytes() == b"deep"


@pytest.mark.parametrize("cut", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_a_cut_bundle_is_refused(exported: Path, other: Store, cut: float) -> None:
    """A copy that broke off is named as such, wherever it broke off."""
    content = exported.read_bytes()
    exported.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(SparkLlmError) as caught:
        import_bundle(other.root, exported)
    assert caught.value.reason in (
        Reason.MODEL_CORRUPT,
        Reason.MODEL_UNSAFE,
        Reason.MODEL_INCOMPLETE,
    )
    assert other.models() == []


def test_a_bundle_that_does_not_fit_is_refused_first(exported: Path, other: Store) -> None:
    """The disk is asked before the first byte is written."""
    with pytest.raises(SparkLlmError) as caught:
        import_bundle(other.root, exported, reserve_bytes=2**62)
    assert caught.value.reason is Reason.NO_DISK
    assert [path.name for path in other.root.iterdir()] == [".locks"]


AS_OWNER = """
import encodings.ascii, os, sys  # before the owner acts, who may not see this interpreter
from pathlib import Path
import rich.console
from spark_llm.commands import progress_view, store
from spark_llm.errors import SparkLlmError
from spark_llm.store import bundle, unbundle
file, target = map(Path, sys.argv[1:])
store.import_(file, config=None)
try:
    store.export_bundle("org/name", target, config=None)
except SparkLlmError as error:
    print(os.geteuid(), error.reason, error.hint)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_root_carries_for_the_service(exported: Path, short_path: Path) -> None:
    """A bundle in a closed home is imported all the same; where the service may not write, the hint says what to do."""
    other = 4321
    exported.parent.chmod(0o700)
    short_path.chmod(0o755)
    state = short_path / "state"
    state.mkdir(mode=0o750)
    os.chown(state, other, other)
    done = subprocess.run(
        [sys.executable, "-c", AS_OWNER, exported, exported.with_name("again")],
        env={**os.environ, "STATE_DIRECTORY": str(state), "SPARK_LLM_STORE__RESERVE_BYTES": "0"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    imported, refused = done.stdout.splitlines()
    assert imported.endswith("3 files, verified")
    assert refused.startswith(f"{other} {Reason.UNWRITABLE_DIRECTORY} ")
    assert "/var/tmp" in refused  # noqa: S108  part of the hint
    weights = (Store(state / "models").locate(MODEL) or Path()) / "model.safetensors"
    assert weights.stat().st_uid == other
