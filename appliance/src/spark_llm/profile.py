"""What to serve: profiles, read from TOML files.

A profile names one model and everything its engine is started with. Shipped profiles lie in the package; a file of the
same name in ``/etc/spark-llm/profiles`` takes its place.
"""

import re
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spark_llm.errors import ConfigError
from spark_llm.reason import Reason
from spark_llm.validation import explain

DEMO_MODEL = "demo"
"""The model name that ``spark-llm demo-model`` stands behind: made here, never downloaded."""


class Engine(StrEnum):
    """Which build of vLLM a profile is for."""

    CUDA = "cuda"
    CPU = "cpu"


class Canary(BaseModel):
    """The question asked before ready, and what its answer must look like.

    Attributes:
        prompt: sent as one chat message, greedily decoded.
        max_tokens: length of the answer, in tokens.
        pattern: regular expression that the answer must contain (``re.search``); empty accepts any text.
        text: exact answer, where the build is pinned; empty means not checked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = "What is the capital of France? Answer in one word."
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    pattern: str = ""
    text: str = ""


class Profile(BaseModel):
    """One model and how it is served.

    Attributes:
        name: the file's name without ``.toml``.
        description: one line for ``spark-llm profiles``.
        engine: which build of vLLM.
        model: ``ORG/NAME`` on the hub, a folder, or ``demo``.
        revision: 40-hex commit of the model; empty for local folders and the demo.
        aliases: further names clients may ask for; ``default`` always works.
        context: longest prompt plus answer, in tokens (``--max-model-len``).
        max_num_seqs: sequences decoded together.
        max_num_batched_tokens: tokens in one engine step.
        kv_cache_dtype: ``auto``, ``fp8``, ... (``--kv-cache-dtype``).
        kv_cache_bytes: size of the KV cache in bytes (``--kv-cache-memory-bytes``).
        flags: further engine flags, verbatim.
        environment: further environment variables of the engine.
        canary: the proof of correct tokens before ready.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    engine: Engine = Engine.CUDA
    model: str
    revision: str = ""
    aliases: tuple[str, ...] = ()
    context: Annotated[int, Field(ge=16)]
    max_num_seqs: Annotated[int, Field(ge=1)]
    max_num_batched_tokens: Annotated[int, Field(ge=1)]
    kv_cache_dtype: str = "auto"
    kv_cache_bytes: Annotated[int, Field(ge=1)]
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    canary: Canary = Canary()


_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def shipped_folder() -> Path:
    """Where the shipped profiles lie: in the package once installed, beside it in a checkout."""
    packaged = Path(__file__).parent / "_data" / "profiles"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "profiles"


def load_profile(name: str, folders: tuple[Path, ...]) -> Profile:
    """Read the profile ``name`` from the first of ``folders`` that has it.

    Raises:
        ConfigError: no such profile, no TOML, or not a profile.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a profile name",
            reason=Reason.UNKNOWN_PROFILE,
            hint="`spark-llm profiles` lists them.",
        )
    for folder in folders:
        path = folder / f"{name}.toml"
        if path.is_file():
            return parse_profile(name, path.read_text(encoding="utf-8"), str(path))
    known = ", ".join(profile_names(folders)) or "none"
    raise ConfigError(
        f"no profile is named {name!r}",
        reason=Reason.UNKNOWN_PROFILE,
        hint=f"Known profiles: {known}.",
    )


def profile_names(folders: tuple[Path, ...]) -> list[str]:
    """Names of all profiles in ``folders``, sorted."""
    return sorted({path.stem for folder in folders for path in folder.glob("*.toml")})


def parse_profile(name: str, text: str, source: str) -> Profile:
    """Profile from TOML text.

    Raises:
        ConfigError: names the key and the nearest known one.
    """
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not TOML: {error}", reason=Reason.BAD_PROFILE) from error
    try:
        return Profile.model_validate({**data, "name": name})
    except ValidationError as error:
        raise ConfigError(
            f"{source}: {explain(error, Profile)}", reason=Reason.BAD_PROFILE
        ) from error
