"""All profiles, and which of them answers to a model's name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from spark_llm.argv import served_names
from spark_llm.config import Models
from spark_llm.errors import ConfigError
from spark_llm.profile import Profile, load_profile, profile_names
from spark_llm.reason import Reason


@dataclass(frozen=True)
class Catalogue:
    """What was found in the folders of profiles.

    Attributes:
        profiles: sorted by name.
        faults: what is wrong with each of the files that are none, by its profile's name.
    """

    profiles: tuple[Profile, ...] = ()
    faults: Mapping[str, ConfigError] = field(default_factory=dict)

    def serving(self, model: str) -> Profile | None:
        """The profile that answers to ``model``; None where no profile does, and for ``default``.

        Where several do, it is the one of that name, else the first.
        """
        return self._by_model.get(model)

    @cached_property
    def _by_model(self) -> dict[str, Profile]:
        named = {
            name: profile for profile in reversed(self.profiles) for name in served_names(profile)
        }
        named |= {profile.name: profile for profile in self.profiles}
        named.pop("default", None)
        return named


def read(folders: tuple[Path, ...]) -> Catalogue:
    """Read and validate all profiles; one that is broken does not hide the others.

    Args:
        folders: of profiles; earlier ones win.
    """
    profiles: list[Profile] = []
    faults: dict[str, ConfigError] = {}
    for name in profile_names(folders):
        try:
            profiles.append(load_profile(name, folders))
        except ConfigError as error:
            faults[name] = error
        except OSError as error:
            faults[name] = ConfigError(
                f"profile {name} cannot be read: {error}", reason=Reason.BAD_PROFILE
            )
    return Catalogue(tuple(profiles), faults)


def read_pinned(models: Models, first: Profile, folders: tuple[Path, ...]) -> tuple[Profile, ...]:
    """The profiles that ``models.pinned`` names.

    Args:
        models: what may be loaded.
        first: the profile beside which they are.
        folders: of profiles; earlier ones win.

    Raises:
        ConfigError: one is unknown, or all together are more engines than may be loaded.
    """
    pinned = tuple(load_profile(name, folders) for name in models.pinned)
    together = {first.name, *(profile.name for profile in pinned)}
    if models.pinned and len(together) > models.max_loaded:
        raise ConfigError(
            f"models.pinned and the first model are {len(together)} engines, and "
            f"models.max_loaded = {models.max_loaded}",
            hint="Raise models.max_loaded, or pin fewer.",
        )
    return pinned
