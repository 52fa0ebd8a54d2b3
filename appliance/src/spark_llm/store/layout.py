"""Where things lie in the store.

::

    <root>/ORG--NAME/
        <commit>/                 a snapshot: complete and verified, or it is not here
            .spark-llm/receipt.json
        incoming/<commit>/        what a pull has so far; becomes the snapshot by one rename
            .spark-llm/plan.json  the commit's files and hashes
            .spark-llm/verified.jsonl
            .spark-llm/parts/     partial files
        quarantine/<commit>/      files with wrong content, kept for a look
        refs.json                 which commit a branch or tag stood for when it was asked
        progress.json             the running pull, for those who watch
    <root>/.locks/ORG--NAME.write  held by the one who changes the model
    <root>/.locks/ORG--NAME.use    held, shared, by those who read it
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spark_llm.store.lock import Lock
from spark_llm.store.plan import check_model_name, is_commit
from spark_llm.store.receipt import OWN_FOLDER


@dataclass(frozen=True)
class ModelFolder:
    """All paths of one model.

    Attributes:
        root: the store.
        model: ``ORG/NAME``.
    """

    root: Path
    model: str

    @property
    def path(self) -> Path:
        """The model's folder."""
        return self.root / folder_name(self.model)

    @property
    def refs(self) -> Path:
        """Branches and tags, and the commits they stood for."""
        return self.path / "refs.json"

    @property
    def progress(self) -> Path:
        """The last progress event of the running pull."""
        return self.path / "progress.json"

    @property
    def write_lock(self) -> Lock:
        """Held by whoever pulls, imports, repairs or removes."""
        return Lock(self.root / ".locks" / f"{folder_name(self.model)}.write", self.model)

    @property
    def use_lock(self) -> Lock:
        """Held, shared, by whoever serves, verifies or exports."""
        return Lock(self.root / ".locks" / f"{folder_name(self.model)}.use", self.model)

    def snapshot(self, commit: str) -> Path:
        """Where ``commit`` is once it is verified."""
        return self.path / commit

    def incoming(self, commit: str) -> "Incoming":
        """Where ``commit`` grows."""
        return Incoming(self.path / "incoming" / commit)

    def quarantine(self, commit: str) -> Path:
        """Where bad files of ``commit`` go."""
        return self.path / "quarantine" / commit

    def commits(self) -> list[str]:
        """Commits that have a snapshot."""
        if not self.path.is_dir():
            return []
        return sorted(
            entry.name for entry in self.path.iterdir() if is_commit(entry.name) and entry.is_dir()
        )

    def unfinished(self) -> list[str]:
        """Commits that a pull has begun."""
        folder = self.path / "incoming"
        return (
            sorted(entry.name for entry in folder.iterdir() if is_commit(entry.name))
            if folder.is_dir()
            else []
        )


@dataclass(frozen=True)
class Incoming:
    """A snapshot in the making.

    Attributes:
        path: its folder.
    """

    path: Path

    @property
    def own(self) -> Path:
        """Our files in it."""
        return self.path / OWN_FOLDER

    @property
    def plan(self) -> Path:
        """The commit's files and hashes."""
        return self.own / "plan.json"

    @property
    def journal(self) -> Path:
        """One line for each file that was verified."""
        return self.own / "verified.jsonl"

    @property
    def parts(self) -> Path:
        """Partial files."""
        return self.own / "parts"

    def part(self, path: str) -> Path:
        """Partial file of ``path``; hashed, so that no repository can name a file like one."""
        return self.parts / hashlib.sha256(path.encode()).hexdigest()[:24]


def folder_name(model: str) -> str:
    """``ORG--NAME``: unique, because the hub allows no ``--`` in names.

    Raises:
        ConfigError: not a model name.
    """
    return check_model_name(model).replace("/", "--")


def model_folders(root: Path) -> Iterator[ModelFolder]:
    """All models that have a folder, sorted by name."""
    if root.is_dir():
        for entry in sorted(root.iterdir()):
            if not entry.name.startswith(".") and entry.is_dir():
                yield ModelFolder(root, entry.name.replace("--", "/"))
