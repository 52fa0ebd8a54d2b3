"""From a profile to the command line and the manifest of what it starts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from spark_llm.config import Engine, Settings
from spark_llm.demo_model import write_demo_model
from spark_llm.folders import Folders
from spark_llm.prepare import Preparation, Prepared
from spark_llm.profile import Speculative, load_profile, shipped_folder
from spark_llm.promises import Promises
from spark_llm.status import Bus, Status, StatusBoard
from spark_llm.store import Note, Request, Store
from spark_llm.store.progress import Event

from tests.appliance.service import stub_python

pytestmark = pytest.mark.anyio


async def _prepared(folder: Path, model: str, draft: str) -> Prepared:
    """What a run of ``model`` with ``draft`` needs, on the stub engine."""
    settings = Settings(engine=Engine(python=str(stub_python(folder))))
    folders = Folders(folder / "state", folder / "cache", folder / "run", ())
    board = StatusBoard(Bus(), Status())
    preparation = Preparation(settings, folders, board, lambda: None, Promises())
    profile = load_profile("demo", (shipped_folder(),)).model_copy(
        update={
            "model": model,
            "speculative": Speculative(method="draft_model", tokens=2, model=draft),
        }
    )
    with ExitStack() as holding:
        return await preparation.prepare(profile, holding)


async def test_manifest_knows_local_models_by_their_files(short_path: Path) -> None:
    """Model and draft in local folders are told by their files; where these lie is in no flag of the manifest."""
    model, draft = short_path / "model", short_path / "draft"
    for folder in (model, draft):
        write_demo_model(folder)
    first = await _prepared(short_path, str(model), str(draft))
    assert any(f'"{draft}"' in argument for argument in first.command.args)
    assert not any(str(short_path) in flag for flag in first.manifest.flags)
    assert first.manifest.flags[0].startswith("--")
    assert first.manifest.draft_commit.startswith("local:")
    again = await _prepared(short_path, str(model), str(draft))
    assert again.manifest == first.manifest
    (draft / "config.json").write_bytes((draft / "config.json").read_bytes() + b"\n")
    changed = await _prepared(short_path, str(model), str(draft))
    assert changed.manifest.model_commit == first.manifest.model_commit
    assert changed.manifest.draft_commit != first.manifest.draft_commit


async def test_manifest_knows_hub_models_by_their_commits(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unpinned model or draft of the hub is the commit that the store has, wherever the store lies."""
    manifests = []
    for place in ("here", "there"):
        lying = short_path / place
        for name in ("org/model", "org/draft"):
            write_demo_model(lying / name)
        monkeypatch.setattr(Store, "locate", lambda _, model, __="", at=lying: at / model)
        monkeypatch.setattr(Store, "commit", lambda _, model, __="": f"commit of {model}")
        monkeypatch.setattr(Store, "reading", lambda *_: contextlib.nullcontext())
        prepared = await _prepared(short_path, "org/model", "org/draft")
        assert any(str(lying / "org/draft") in argument for argument in prepared.command.args)
        manifests.append(prepared.manifest)
    assert manifests[0].model_commit == "commit of org/model"
    assert manifests[0].draft_commit == "commit of org/draft"
    assert manifests[0] == manifests[1]


async def test_cancelled_preparation_ends_its_fetch(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preparation that is cancelled while it fetches is over only when the fetching process is."""
    fetching = asyncio.Event()
    ended = []

    async def fetch(_: Request) -> AsyncIterator[Event]:
        try:
            fetching.set()
            await asyncio.Event().wait()
            yield Note("never")
        finally:
            await asyncio.sleep(0)  # the process takes a moment to end
            ended.append("fetch")

    monkeypatch.setattr("spark_llm.prepare.fetch", fetch)
    work = asyncio.create_task(_prepared(short_path, "org/model", "org/draft"))
    await fetching.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert ended == ["fetch"]
