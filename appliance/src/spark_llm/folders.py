"""Where state, cache and runtime files lie."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_llm.config import Paths
from spark_llm.errors import ConfigError
from spark_llm.reason import Reason


@dataclass(frozen=True)
class Folders:
    """Four places.

    Attributes:
        state: models, receipts, API keys.
        cache: compile caches, and the engine's HOME.
        runtime: the engine's socket and the instance's lock.
        profiles: folders of profiles; earlier ones win.
    """

    state: Path
    cache: Path
    runtime: Path
    profiles: tuple[Path, ...]

    @property
    def models(self) -> Path:
        """Where models lie."""
        return self.state / "models"

    @property
    def keys(self) -> Path:
        """Hashes of the API keys."""
        return self.state / "keys.json"

    @property
    def high_water(self) -> Path:
        """The most memory each profile's engine has taken."""
        return self.state / "high-water.json"

    def make(self) -> "Folders":
        """Create what is missing, readable by the owner and group only.

        Raises:
            ConfigError: one of them cannot be made or written.
        """
        for folder in (self.state, self.cache, self.runtime):
            try:
                folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"cannot create {folder}: {error.strerror}",
                    reason=Reason.UNWRITABLE_DIRECTORY,
                    hint="Set paths.state, paths.cache and paths.runtime to folders you may write.",
                ) from error
            if not os.access(folder, os.W_OK | os.X_OK):
                raise ConfigError(
                    f"{folder} is not writable for user id {os.getuid()}",
                    reason=Reason.UNWRITABLE_DIRECTORY,
                    hint="Change its owner, or set paths.* to folders you may write.",
                )
        return self


def resolve(paths: Paths, environment: Mapping[str, str], shipped: Path) -> Folders:
    """Folders from the configuration, else systemd's variables, else the XDG base directories.

    systemd may name several folders, separated by colons; the first is ours.
    """
    home = Path(environment.get("HOME", "/nonexistent"))

    def pick(given: str, systemd: str, xdg: str, fallback: Path) -> Path:
        if given:
            return Path(given)
        if systemd in environment:
            return Path(environment[systemd].split(":")[0])
        if environment.get(xdg):
            return Path(environment[xdg]) / "spark-llm"
        return fallback / "spark-llm"

    return Folders(
        state=pick(paths.state, "STATE_DIRECTORY", "XDG_STATE_HOME", home / ".local" / "state"),
        cache=pick(paths.cache, "CACHE_DIRECTORY", "XDG_CACHE_HOME", home / ".cache"),
        runtime=pick(
            paths.runtime, "RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR", home / ".cache" / "run"
        ),
        profiles=(Path(paths.profiles), shipped),
    )
