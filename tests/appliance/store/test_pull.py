"""Pulls: what is fetched, what is not fetched again, and what a person sees."""

import json
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from spark_llm.store import Store
from spark_llm.store.layout import ModelFolder

from tests.hub.pulls import FILES, MODEL, WEIGHTS, Puller
from tests.hub.server import LocalHub


def test_a_pull_brings_every_file_and_verifies_it(pull: Puller) -> None:
    """The snapshot has the hub's files, a receipt, and is found from then on."""
    commit = pull.hub.add(MODEL, FILES)
    result = pull().result
    assert (result.commit, result.files, result.bytes) == (commit, 3, sum(map(len, FILES.values())))  # type: ignore[arg-type]
    assert pull.store.locate(MODEL) == Path(result.path)
    for name, content in FILES.items():
        assert (Path(result.path) / name).read_bytes() == content
    assert pull.store.verify(MODEL, full=True).ok


def test_progress_reaches_the_end(pull: Puller) -> None:
    """Bytes never go back without a fault, and the last report counts everything."""
    pull.hub.add(MODEL, FILES)
    pull.hub.fault("trickle")
    progress = pull().progress
    counts = [event.bytes for event in progress]
    assert counts == sorted(counts)
    assert len(counts) > 3
    assert (progress[-1].bytes, progress[-1].files_done) == (progress[-1].total, 3)


def test_a_pinned_model_that_is_here_needs_no_network(pull: Puller) -> None:
    """Serving what was pulled works with the hub gone."""
    commit = pull.hub.add(MODEL, FILES)
    pull()
    pull.hub.seen.clear()
    assert pull(revision=commit, refresh=True).result.fetched_bytes == 0
    assert pull().result.commit == commit
    assert pull.hub.seen == []


def test_a_branch_moves_only_when_asked(pull: Puller) -> None:
    """A moving branch is resolved once and recorded; a refresh asks again and fetches only what changed."""
    old = pull.hub.add(MODEL, FILES)
    pull()
    new = pull.hub.add(MODEL, {**FILES, "config.json": b'{"architectures": ["NewForCausalLM"]}'})
    pull.hub.seen.clear()
    assert pull().result.commit == old
    result = pull(refresh=True).result
    assert result.commit == new
    assert pull.hub.downloads("model.safetensors") == []
    assert pull.store.locate(MODEL, old) is not None
    assert pull.store.locate(MODEL) == Path(result.path)


def test_a_refresh_without_the_hub_keeps_to_what_is_here(pull: Puller) -> None:
    """No network is no reason to stop serving what is on the disk."""
    commit = pull.hub.add(MODEL, FILES)
    pull()
    pulled = pull(endpoint="http://127.0.0.1:9", refresh=True, attempts=1)
    assert pulled.result.commit == commit
    assert any("keeping to the known commit" in note for note in pulled.notes)


def test_offline_nothing_is_fetched_and_the_unit_that_may_is_named(
    pull: Puller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With HF_HUB_OFFLINE a missing model is refused before the hub is asked; what is here is served."""
    pull.hub.add(MODEL, FILES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failure = pull(revision="main").failure
    assert failure.reason == "model_missing"
    assert f'"spark-llm-fetch@$(systemd-escape {MODEL}@main)"' in failure.hint
    assert pull.hub.seen == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    commit = pull().result.commit
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull(refresh=True).result.commit == commit


def test_a_tag_and_a_commit_name_the_same_snapshot(pull: Puller) -> None:
    """Revisions are names; the commit is what is stored."""
    commit = pull.hub.add(MODEL, FILES, branch="v1.0")
    assert pull(revision="v1.0").result.commit == commit
    assert pull.store.locate(MODEL, "v1.0") == pull.store.locate(MODEL, commit)
    assert pull.store.locate(MODEL) is None


def test_long_listings_are_read_to_the_end(pull: Puller) -> None:
    """A repository with more files than one page of the hub's listing comes whole."""
    pull.hub.add(MODEL, {**FILES, **{f"extra/{n}.txt": b"%d" % n for n in range(45)}})
    assert pull().result.files == 48


def test_a_dry_run_writes_nothing(pull: Puller) -> None:
    """The size is known before the first byte, and the store stays as it was."""
    pull.hub.add(MODEL, FILES)
    result = pull(dry_run=True).result
    assert result.fetched_bytes == result.bytes > len(WEIGHTS)
    assert pull.store.models() == []
    assert [path.name for path in pull.store.root.iterdir()] == [".locks"]
    assert pull.hub.downloads("model.safetensors") == []


def test_weights_of_other_frameworks_stay_where_they_are(pull: Puller) -> None:
    """Pickles beside safetensors and other frameworks' files are never fetched."""
    pull.hub.add(
        MODEL,
        {**FILES, "pytorch_model.bin": WEIGHTS, "tf_model.h5": WEIGHTS, "model.onnx": WEIGHTS},
    )
    result = pull().result
    assert sorted(path.name for path in Path(result.path).iterdir() if path.is_file()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_second_pull_watches_the_first(pull: Puller) -> None:
    """Two pulls of one model fetch it once, and both see progress and the result."""
    pull.hub.add(MODEL, FILES)
    pull.hub.fault("trickle")
    first: list[object] = []
    thread = threading.Thread(target=lambda: first.append(pull().result))
    thread.start()
    pull.hub.wait_for("model.safetensors")
    second = pull()
    thread.join()
    assert second.result.fetched_bytes == 0
    assert "watching it" in second.notes[0]
    assert second.progress
    assert len(pull.hub.downloads("model.safetensors")) == 1
    assert len(first) == 1


def test_pulls_of_different_models_do_not_wait(pull: Puller) -> None:
    """The lock is one a model."""
    pull.hub.add(MODEL, FILES)
    pull.hub.add("org/other", FILES)
    with ModelFolder(pull.store.root, MODEL).write_lock.hold("test"):
        assert pull("org/other").result.files == 3


@pytest.mark.parametrize(("mode", "expected"), [(0o2775, 0o664), (0o750, 0o640), (0o700, 0o600)])
def test_permissions_follow_the_stores_own(pull: Puller, mode: int, expected: int) -> None:
    """What the store's folder allows its group and others, the files in it allow too."""
    pull.hub.add(MODEL, FILES)
    pull.store.root.mkdir()
    pull.store.root.chmod(mode)
    snapshot = Path(pull().result.path)
    for path in (snapshot / "model.safetensors", snapshot / ".spark-llm" / "receipt.json"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o666 == expected, path


def test_nothing_of_a_pull_stays_in_the_page_cache(pull: Puller) -> None:
    """On unified memory cached pages count against the model: weights leave the cache once they are hashed."""
    pull.hub.add(MODEL, FILES)
    weights = Path(pull().result.path) / "model.safetensors"
    assert resident_bytes(weights) == 0
    weights.read_bytes()
    assert resident_bytes(weights) > 0
    pull.store.verify(MODEL, full=True)
    assert resident_bytes(weights) == 0


def resident_bytes(path: Path) -> int:
    answer = subprocess.run(
        ["fincore", "--bytes", "--json", str(path)], check=True, capture_output=True, text=True
    ).stdout
    return int(json.loads(answer)["fincore"][0]["res"])


def test_the_hub_alone_gets_the_token(pull: Puller, tmp_path: Path) -> None:
    """The token goes to the hub and to nobody else: no CDN, no argument, no event, no file of the store."""
    pull.hub.add(MODEL, FILES)
    pull.hub.models[MODEL].private = True
    secret = tmp_path / "token"
    secret.write_text(f"{pull.hub.token}\n")
    pulled = pull(token_file=str(secret))
    assert pulled.result.files == 3
    authorized = {(seen.server, bool(seen.authorization)) for seen in pull.hub.seen}
    assert authorized == {("hub", True), ("cdn", False)}
    assert pull.hub.token not in repr(pulled.events)
    assert pull.hub.token not in " ".join(pull.request.command())
    for path in pull.store.root.rglob("*"):
        assert path.is_dir() or pull.hub.token.encode() not in path.read_bytes()


@pytest.mark.parametrize("source", ["credential", "environment", "login"])
def test_the_token_comes_from_where_it_may(
    pull: Puller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """A systemd credential, the environment and `hf auth login` all serve a private model."""
    pull.hub.add(MODEL, FILES)
    pull.hub.models[MODEL].private = True
    if source == "credential":
        (tmp_path / "hub-token").write_text(pull.hub.token)
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif source == "environment":
        monkeypatch.setenv("HF_TOKEN", pull.hub.token)
    else:
        (tmp_path / "hf-home").mkdir()
        (tmp_path / "hf-home" / "token").write_text(pull.hub.token)
    assert pull().result.files == 3


def test_quarantined_files_are_kept_for_a_look(pull: Puller) -> None:
    """A file with wrong content is put aside and fetched again, alone."""
    pull.hub.add(MODEL, {**FILES, "other.safetensors": WEIGHTS[::-1]})
    pull.hub.fault("corrupt", "model.safetensors")
    result = pull().result
    bad = ModelFolder(pull.store.root, MODEL).quarantine(result.commit) / "model.safetensors"
    assert bad.read_bytes()[:16] == bytes(255 - byte for byte in WEIGHTS[:16])
    assert len(pull.hub.downloads("model.safetensors")) == 2
    assert len(pull.hub.downloads("other.safetensors")) == 1


def test_a_damaged_file_of_a_snapshot_is_fetched_again_alone(pull: Puller) -> None:
    """Rot on the disk is found by verify, hides the model, and the next pull mends it."""
    pull.hub.add(MODEL, FILES)
    weights = Path(pull().result.path) / "model.safetensors"
    status = weights.stat()
    with weights.open("r+b") as stream:
        stream.write(b"\xff\xff")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert pull.store.locate(MODEL) is not None
    assert pull.store.verify(MODEL).ok
    assert pull.store.verify(MODEL, full=True).corrupt == ("model.safetensors",)
    assert pull.store.locate(MODEL) is None
    pull.hub.seen.clear()
    pull()
    assert [seen.file for seen in pull.hub.seen if seen.sent] == ["model.safetensors"]
    assert pull.store.verify(MODEL, full=True).ok


def test_a_touched_file_is_hashed_and_kept(pull: Puller) -> None:
    """A new mtime hides the snapshot until the next pull has read the file; nothing is fetched."""
    pull.hub.add(MODEL, FILES)
    os.utime(Path(pull().result.path) / "config.json", ns=(1, 1))
    assert pull.store.locate(MODEL) is None
    pull.hub.seen.clear()
    assert pull().result.fetched_bytes == 0
    assert pull.store.locate(MODEL) is not None
    assert pull.hub.seen == []


def test_a_lost_file_is_fetched_again_alone(pull: Puller) -> None:
    """A file that somebody deleted comes back without the others."""
    pull.hub.add(MODEL, FILES)
    (Path(pull().result.path) / "config.json").unlink()
    pull.hub.seen.clear()
    pull()
    assert [seen.file for seen in pull.hub.seen if seen.sent] == ["config.json"]


def test_a_model_that_is_served_is_not_removed(pull: Puller) -> None:
    """Rm refuses while somebody reads, and names who and why."""
    pull.hub.add(MODEL, FILES)
    pull()
    with (
        pull.store.reading(MODEL, "serving"),
        pytest.raises(Exception, match=r"in use by process \d+ \(serving\)"),
    ):
        pull.store.remove(MODEL)
    assert pull.store.remove(MODEL) > len(WEIGHTS)
    assert pull.store.models() == []
    assert pull.store.locate(MODEL) is None


def test_another_revision_can_be_pulled_while_one_is_served(pull: Puller) -> None:
    """Fetching the next version does not wait for the running one to stop."""
    pull.hub.add(MODEL, FILES)
    pull()
    new = pull.hub.add(MODEL, {**FILES, "config.json": b'{"architectures": []}'})
    with pull.store.reading(MODEL, "serving"):
        assert pull(refresh=True).result.commit == new
    pull.store.remove(MODEL, new)
    assert [model.commit for model in pull.store.models()] != [new]


def test_a_read_only_store_serves_and_verifies(pull: Puller, hub: LocalHub, store: Store) -> None:
    """Everything that only reads works on a store that cannot be written."""
    hub.add(MODEL, FILES)
    pull()
    script = (
        "from pathlib import Path; import sys; from spark_llm.store import Store\n"
        f"s = Store(Path({str(store.root)!r}))\n"
        f"with s.reading({MODEL!r}, 'serving'): print(s.locate({MODEL!r}), s.verify({MODEL!r}, full=True).ok)\n"
    )
    mount = f"mount --bind {store.root} {store.root} && mount -o remount,ro,bind {store.root} && exec python -c "
    ran = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", f'{mount} "$0"', script],
        check=False, capture_output=True, text=True,
        env={**os.environ, "PATH": f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"},  # type: ignore[attr-defined]
    )  # fmt: skip
    assert ran.stdout.strip().endswith("True"), ran.stderr
