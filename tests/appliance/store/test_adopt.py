"""Adoption: what is already on this machine is linked, not fetched, and verified all the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from spark_llm.reason import Reason

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
