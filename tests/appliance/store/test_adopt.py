"""Adoption: what is already on this machine is linked, not fetched, and verified all the same."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from spark_llm.reason import Reason
from spark_llm.store import Store, adopt

from tests.hub.pulls import FILES, MODEL, Puller


@pytest.fixture
def cache(pull: Puller, tmp_path: Path) -> Path:
    """A Hugging Face cache that the real `hf download` filled."""
    pull.hub.add(MODEL, FILES)
    hf = Path(sys.executable).with_name("hf")
    folder = tmp_path / "hf-cache"
    subprocess.run(
        [hf, "download", MODEL, "--cache-dir", str(folder)],
        check=True, capture_output=True,
        env={**os.environ, "HF_ENDPOINT": pull.hub.endpoint, "HF_HUB_DISABLE_UPDATE_CHECK": "1"},
    )  # fmt: skip
    pull.hub.seen.clear()
    return folder


def test_a_hub_cache_is_adopted_without_a_network_or_a_copy(pull: Puller, cache: Path) -> None:
    """The cache knows commit and hashes; its files are linked and every byte is verified."""
    result = pull(adopt=str(cache)).result
    assert result.fetched_bytes == 0
    assert pull.hub.seen == []
    weights = Path(result.path) / "model.safetensors"
    assert next(cache.rglob("*.safetensors")).resolve().samefile(weights)
    shutil.rmtree(cache)
    assert pull.store.verify(MODEL, full=True).ok


def test_damaged_and_missing_files_of_a_cache_are_fetched(pull: Puller, cache: Path) -> None:
    """Only what is wrong in the other place comes over the network."""
    weights = next(cache.rglob("*.safetensors")).resolve()
    weights.chmod(0o644)
    weights.write_bytes(b"X" + weights.read_bytes()[1:])
    result = pull(adopt=str(cache)).result
    assert {seen.file for seen in pull.hub.seen if seen.sent} == {"model.safetensors"}
    assert result.fetched_bytes == len(FILES["model.safetensors"])  # type: ignore[arg-type]  # bytes here
    assert pull.store.verify(MODEL, full=True).ok


def test_a_plain_folder_is_adopted_by_content(pull: Puller, tmp_path: Path) -> None:
    """A folder that somebody copied here serves as a source for whatever in it is right."""
    pull.hub.add(MODEL, FILES)
    folder = tmp_path / "copied"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"])  # type: ignore[arg-type]  # bytes here
    (folder / "config.json").write_bytes(b"{}")
    result = pull(adopt=str(folder)).result
    assert pull.hub.downloads("model.safetensors") == []
    assert (Path(result.path) / "config.json").read_bytes() == FILES["config.json"]


def test_another_file_system_is_linked_by_name(pull: Puller, cache: Path) -> None:
    """Where a hard link cannot reach, the snapshot holds symbolic links, and a change over there is noticed."""
    with_shm = Path("/dev/shm") / f"spark-llm-test-{os.getpid()}"  # noqa: S108  another file system is the point
    shutil.copytree(cache, with_shm, symlinks=True)
    try:
        result = pull(adopt=str(with_shm)).result
        weights = Path(result.path) / "model.safetensors"
        assert weights.is_symlink()
        assert pull.store.locate(MODEL) is not None
        weights.resolve().unlink()
        assert pull.store.locate(MODEL) is None
    finally:
        shutil.rmtree(with_shm)


def test_a_folder_that_is_not_there_is_refused(pull: Puller, tmp_path: Path) -> None:
    """A mistyped folder is an error, not a silent download."""
    pull.hub.add(MODEL, FILES)
    assert pull(adopt=str(tmp_path / "nothing")).failure.reason == Reason.MODEL_MISSING
    assert pull.hub.seen == []


OTHER = 4321
AS_OWNER = """
import encodings.ascii, json, os, sys  # before the owner acts, who may not see this interpreter
from pathlib import Path
from spark_llm.errors import SparkLlmError
from spark_llm.owner import open_first
from spark_llm.store import Request, adopt
from spark_llm.store.fetch import Fetch
home, state, request = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
adopt._HIDDEN = (str(home),)
request["adopt"] = f"/proc/self/fd/{open_first(home, state, os.O_DIRECTORY)}"
try:
    print(os.geteuid(), Fetch(Request(**request), lambda _: None).run().fetched_bytes)
except SparkLlmError as error:
    print(error.reason, error.message, error.hint)
"""


@pytest.fixture
def service(short_path: Path) -> Store:
    """The store of another user, in a place that it can reach."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    short_path.chmod(0o755)
    state = short_path / "state"
    state.mkdir(mode=0o750)
    os.chown(state, OTHER, OTHER)
    return Store(state / "models")


def sudo(pull: Puller, folder: Path, service: Store, **changes: object) -> str:
    """What a pull says that root starts and the store's owner ends; ``folder`` counts as a home."""
    request = {**asdict(pull.request), "root": str(service.root), **changes}
    request["model"] = MODEL
    return subprocess.run(
        [sys.executable, "-c", AS_OWNER, folder, service.root.parent, json.dumps(request)],
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout.strip()  # fmt: skip


def test_files_in_a_home_are_copied(pull: Puller, cache: Path, service: Store) -> None:
    """Root adopts for the service what lies in a closed home: a link would lead where the service sees nothing."""
    cache.parent.chmod(0o700)
    subprocess.run(["chmod", "-R", "a+rX", cache], check=True)
    assert sudo(pull, cache, service) == f"{OTHER} 0"
    weights = (service.locate(MODEL) or Path()) / "model.safetensors"
    assert not weights.is_symlink()
    assert weights.stat().st_uid == OTHER
    assert pull.hub.seen == []
    shutil.rmtree(cache)
    assert service.verify(MODEL, full=True).ok


def test_a_copy_needs_space(pull: Puller, cache: Path, service: Store) -> None:
    """What must be copied counts when the disk is asked; links do not."""
    subprocess.run(["chmod", "-R", "a+rX", cache], check=True)
    assert sudo(pull, cache, service, reserve_bytes=2**62).startswith(Reason.NO_DISK)
    assert pull(adopt=str(cache), reserve_bytes=2**62).result.fetched_bytes == 0


@pytest.mark.parametrize("closed", ["trees/*", "blobs/*", "snapshots", "."])
def test_the_hint_of_what_may_not_be_read_helps(
    pull: Puller, cache: Path, service: Store, closed: str
) -> None:
    """What the owner cannot read is an error, not a silent download, and the command that it names mends it."""
    model = next(cache.glob("models--*"))
    subprocess.run(["chmod", "-R", "a+rX", cache], check=True)
    for path in model.glob(closed) if closed != "." else [model]:
        path.chmod(0o600)
    said = sudo(pull, model, service)
    assert said.startswith(f"{Reason.UNWRITABLE_DIRECTORY} cannot adopt {model}")
    subprocess.run(["/bin/sh", "-c", said.split("`")[1].removeprefix("sudo ")], check=True)
    assert sudo(pull, model, service) == f"{OTHER} 0"


def test_a_copy_works_without_help_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel cannot copy between two file systems, reading and writing does."""

    def refuse(*_: int) -> int:
        raise OSError(errno.EXDEV, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "old").write_bytes(b"content")
    adopt._copy(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == b"content"
