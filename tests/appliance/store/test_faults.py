"""Faults of hub, network, disk and people, each with what comes of it, as docs/reference/faults.md says it.

Every case runs the real fetching processes with the real huggingface_hub against a hub on loopback. The page is written
from what the cases did by ``WRITE_FAULTS=1 .venv/bin/python -m pytest tests/appliance/store/test_faults.py``.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from spark_llm.reason import Reason

from tests.hub.pulls import FILES, MODEL, WEIGHTS, Puller

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "faults.md"
WRITING = bool(os.environ.get("WRITE_FAULTS"))
COMMAND = "WRITE_FAULTS=1 .venv/bin/python -m pytest tests/appliance/store/test_faults.py"
HEAD = f"""# What happens when a download goes wrong

Each row is a test: the fetching processes and huggingface_hub are real, the hub is a local one
with faults on demand. Written by `{COMMAND}`.

A pull that fails leaves nothing visible; finished files stay for the next one. The reason is the
code in the API, the journal and `STATUS=`; the number is the command's exit code.

| what happens | outcome | what the command says |
|---|---|---|
"""
SHARD = "model-00001-of-00002.safetensors"
INDEX = json.dumps({"weight_map": {"a": SHARD, "b": "model-00002-of-00002.safetensors"}}).encode()
SHARDED = {"config.json": b"{}", SHARD: WEIGHTS, "model-00002-of-00002.safetensors": WEIGHTS[::-1]}


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        name: for the table.
        fault: arguments of ``LocalHub.fault``, or None.
        files: what the repository holds.
        arrange: anything else to prepare.
        request: changes to the request.
        reason: None if the pull succeeds all the same.
        fetched: how often the weights were sent, where that is the point.
        continued: the second request asked for the rest only.
        hint: words that the hint must hold.
    """

    name: str
    fault: dict[str, object] | None = None
    files: dict[str, bytes | Path] = field(default_factory=lambda: dict(FILES))
    arrange: Callable[[Puller], None] = lambda _: None
    request: dict[str, object] = field(default_factory=dict)
    reason: Reason | None = None
    fetched: int | None = None
    continued: bool = False
    hint: str = ""


def private(pull: Puller) -> None:
    pull.hub.models[MODEL].private = True


def gated(pull: Puller) -> None:
    pull.hub.models[MODEL].gated = True


def gated_with_token(pull: Puller) -> None:
    gated(pull)
    os.environ["HF_TOKEN"] = pull.hub.token  # removed again by the hub fixture's monkeypatch


def wrong_token(pull: Puller) -> None:
    del pull
    os.environ["HF_TOKEN"] = "hf_expired"  # noqa: S105  nobody's


def read_only(pull: Puller) -> None:
    """A folder where a file is in the way, which stops even root."""
    pull.store.root.mkdir()
    (pull.store.root / "org--name").write_text("")


CASES = [
    Case(
        "connection reset in the middle of a file",
        {"kind": "reset", "after": 1_500_000},
        fetched=2,
        continued=True,
    ),
    Case("body ends early", {"kind": "truncate", "after": 1_500_000}, fetched=2, continued=True),
    Case(
        "transfer stalls",
        {"kind": "stall", "after": 1_500_000},
        request={"stall_timeout_s": 5},
        fetched=2,
        continued=True,
    ),
    Case("Xet transfer hangs", {"kind": "xet_stall"}, request={"stall_timeout_s": 5}, fetched=1),
    Case("slow trickle", {"kind": "trickle"}, fetched=1),
    Case("wrong bytes of the right length, once", {"kind": "corrupt"}, fetched=2),
    Case(
        "wrong bytes of the right length, always",
        {"kind": "corrupt", "times": 99},
        reason=Reason.MODEL_CORRUPT,
    ),
    Case(
        "429 with Retry-After",
        {"kind": "status", "status": 429, "headers": {"Retry-After": "1"}},
        fetched=1,
    ),
    Case("503, once", {"kind": "status", "status": 503}, fetched=1),
    Case(
        "503 with Retry-After, on the listing",
        {"kind": "status", "path": "api:*", "headers": {"Retry-After": "1"}},
    ),
    Case(
        "503, always",
        {"kind": "status", "status": 503, "times": 99},
        reason=Reason.NETWORK,
        hint="pull again",
    ),
    Case("signed address of a file runs out (403)", {"kind": "status", "status": 403}),
    Case(
        "403 on a file",
        {"kind": "status", "path": "config.json", "status": 403, "method": "HEAD"},
        reason=Reason.GATED,
        hint="Accept the licence at",
    ),
    Case(
        "404 on a file",
        {"kind": "status", "path": "config.json", "status": 404, "method": "HEAD"},
        reason=Reason.NOT_FOUND,
    ),
    Case("a login page instead of a hub", {"kind": "html", "path": "api:*"}, reason=Reason.NETWORK),
    Case(
        "no hub at all",
        request={"endpoint": "http://127.0.0.1:9", "attempts": 1},
        reason=Reason.NETWORK,
    ),
    Case(
        "no such model",
        request={"model": "org/nothing"},
        reason=Reason.NOT_FOUND,
        hint="Check the name",
    ),
    Case("no such revision", request={"revision": "v9"}, reason=Reason.NOT_FOUND),
    Case(
        "not a model's name", request={"model": "../etc"}, reason=Reason.NOT_FOUND, hint="ORG/NAME"
    ),
    Case("private model, no token", arrange=private, reason=Reason.NOT_FOUND, hint="token"),
    Case("gated model, no token", arrange=gated, reason=Reason.GATED, hint="Accept the licence at"),
    Case(
        "gated model, licence not accepted",
        arrange=gated_with_token,
        reason=Reason.GATED,
        hint="Accept the licence",
    ),
    Case("expired token", arrange=wrong_token, reason=Reason.GATED, hint="Renew the token"),
    Case(
        "disk too small",
        request={"reserve_bytes": 2**62},
        reason=Reason.NO_DISK,
        hint="spark-llm rm",
    ),
    Case("store cannot be written", arrange=read_only, reason=Reason.UNWRITABLE_DIRECTORY),
    Case(
        "pickled weights only",
        files={"config.json": b"{}", "pytorch_model.bin": WEIGHTS},
        reason=Reason.MODEL_UNSAFE,
        hint="--allow-pickle",
    ),
    Case(
        "no weights",
        files={"config.json": b"{}", "README.md": b"hello"},
        reason=Reason.MODEL_INCOMPLETE,
    ),
    Case("no config.json", files={"model.safetensors": WEIGHTS}, reason=Reason.MODEL_INCOMPLETE),
    Case("shards without an index", files={**SHARDED}, reason=Reason.MODEL_INCOMPLETE),
    Case(
        "index names a missing shard",
        files={
            "config.json": b"{}",
            "model.safetensors.index.json": INDEX,
            "model.safetensors": WEIGHTS,
        },
        reason=Reason.MODEL_INCOMPLETE,
    ),
    Case(
        "a shard of the series is missing",
        files={"config.json": b"{}", "model.safetensors.index.json": INDEX, SHARD: WEIGHTS},
        reason=Reason.MODEL_INCOMPLETE,
    ),
    Case(
        "file name leaves the folder",
        files={**FILES, "../../evil": b"x"},
        reason=Reason.MODEL_UNSAFE,
    ),
    Case("absolute file name", files={**FILES, "/etc/evil": b"x"}, reason=Reason.MODEL_UNSAFE),
    Case(
        "file name hides in our folder",
        files={**FILES, ".spark-llm/receipt.json": b"x"},
        reason=Reason.MODEL_UNSAFE,
    ),
]


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, str]]:
    """Rows of the page as the cases found them, by name; written where that was asked for."""
    rows: dict[str, str] = {}
    yield rows
    if WRITING:
        assert rows.keys() == {case.name for case in CASES}, "the page is written from all cases"
        PAGE.write_text(HEAD + "".join(rows[case.name] + "\n" for case in CASES))


@pytest.mark.skipif(WRITING, reason="the page is being written")
def test_page_has_these_cases() -> None:
    """docs/reference/faults.md has its head and a row for each case, in order; test_fault compares the rows."""
    page = PAGE.read_text()
    assert page.startswith(HEAD), f"out of date; write it with: {COMMAND}"
    named = [row.split(" | ")[0] for row in page.removeprefix(HEAD).splitlines()]
    assert named == [f"| {case.name}" for case in CASES], f"out of date; write it with: {COMMAND}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_fault(
    case: Case, pull: Puller, rows: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pull ends as the page says, nothing incomplete is visible, and after the fault it succeeds."""
    monkeypatch.setenv("HF_TOKEN", "")
    pull.hub.add(MODEL, case.files)
    case.arrange(pull)
    if case.fault:
        pull.hub.fault(**case.fault)  # type: ignore[arg-type]  # LocalHub.fault's arguments
    pulled = pull(**case.request)  # type: ignore[arg-type]  # Request's fields
    if case.reason is None:
        assert pulled.result.files == len(case.files)
        assert pull.store.verify(MODEL, full=True).ok
        outcome = "succeeds"
        says = pulled.notes[0] if pulled.notes else "nothing: the library continues by itself"
    else:
        failure = pulled.failure
        assert failure.reason == case.reason, failure
        assert case.hint in failure.hint
        assert failure.message
        assert "Traceback" not in failure.message
        assert all(model.state == "unfinished" for model in pull.store.models())
        assert pull.store.locate(MODEL) is None
        outcome = f"fails: `{failure.reason}`, exit {failure.exit_code}"
        says = f"{failure.message}. {failure.hint}"
    weights = pull.hub.downloads("model.safetensors")
    if case.fetched is not None:
        assert len(weights) == case.fetched
    if case.continued:
        outcome += ", continuing where it broke off"
        assert weights[1].range.startswith("bytes=")
        assert weights[1].sent < len(WEIGHTS)
    assert "X-Amz-Signature" not in repr(pulled.events)
    rows[case.name] = f"| {case.name} | {outcome} | {plain(says, pull)} |"
    if not WRITING:
        assert rows[case.name] in PAGE.read_text().splitlines(), f"write it with: {COMMAND}"


def plain(text: str, pull: Puller) -> str:
    """``text`` without what differs from run to run."""
    text = text.replace(pull.hub.endpoint, "https://huggingface.co").replace(
        "http://127.0.0.1:9", "https://hub.example"
    )
    text = text.replace(str(pull.store.root), "/var/lib/spark-llm/models")
    return re.sub(r"[\d.]+ [TG]B (are free|stay reserved|short)", r"… \1", text)


REFUSED = [
    case
    for case in CASES
    if case.reason in (Reason.MODEL_UNSAFE, Reason.MODEL_INCOMPLETE, Reason.NO_DISK)
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name.replace(" ", "-"))
def test_a_refusal_leaves_the_store_untouched(case: Case, pull: Puller) -> None:
    """What is refused before the first byte leaves no folder, no reference and no file."""
    pull.hub.add(MODEL, case.files)
    assert pull(**case.request).failure.reason == case.reason  # type: ignore[arg-type]  # Request's fields
    assert [path.name for path in pull.store.root.iterdir()] == [".locks"]
    assert pull.hub.downloads("model.safetensors") == []


def test_a_pull_after_a_failure_fetches_only_the_rest(pull: Puller) -> None:
    """Giving up keeps finished files and the part of the unfinished one; the next pull takes both."""
    pull.hub.add(MODEL, {**FILES, "other.safetensors": WEIGHTS[::-1]})
    pull.hub.fault("reset", "model.safetensors", after=1_500_000)
    pull.hub.fault("status", "model.safetensors", status=503, times=99)
    assert pull(attempts=1).failure.reason == Reason.NETWORK
    pull.hub.faults.clear()
    pull.hub.seen.clear()
    result = pull().result
    assert result.fetched_bytes < len(WEIGHTS)
    assert {seen.file for seen in pull.hub.seen if seen.sent} == {"model.safetensors"}
    assert pull.hub.downloads("model.safetensors")[0].range.startswith("bytes=")


def test_pickles_are_accepted_when_asked_for(pull: Puller) -> None:
    """--allow-pickle is the person's decision, and it works."""
    pull.hub.add(MODEL, {"config.json": b"{}", "pytorch_model.bin": WEIGHTS})
    assert pull(allow_pickle=True).result.files == 2


def test_a_disk_that_fills_up_is_named(pull: Puller, tmp_path: Path) -> None:
    """A disk that fills in the middle is no_disk, not a network error, and nothing becomes visible."""
    pull.hub.add(MODEL, {**FILES, **{f"extra/{n}.txt": b"x" for n in range(60)}})
    script = (
        f"mount -t tmpfs -o size=64m,nr_inodes=40 none {tmp_path} && mkdir -p {pull.store.root} && "
        f'exec {sys.executable} -m spark_llm.store.fetch "$0"'
    )
    request = pull.request.command()[-1]
    ran = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script, request],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 3, ran.stderr
    last = json.loads(ran.stdout.splitlines()[-1])
    assert (last["event"], last["reason"]) == ("failure", "no_disk")
    assert "No space left" in last["message"] or "filled up" in last["message"]


def test_the_changed_head_of_a_branch_is_not_mixed_with_the_old_one(pull: Puller) -> None:
    """A branch that moves during a pull changes nothing: the commit was resolved first."""
    old = pull.hub.add(MODEL, FILES)
    pull.hub.fault("reset", "model.safetensors", after=10)
    pull.hub.fault("status", "model.safetensors", status=503, times=99)
    pull(attempts=1)
    pull.hub.faults.clear()
    pull.hub.add(MODEL, {**FILES, "config.json": b'{"architectures": ["New"]}'})
    result = pull().result
    assert result.commit == old
    assert (Path(result.path) / "config.json").read_bytes() == FILES["config.json"]
