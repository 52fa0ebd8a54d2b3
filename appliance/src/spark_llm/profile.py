"""What to serve: profiles, read from TOML files.

A profile names one model and everything its engine is started with. Shipped profiles lie in the
package; a file of the same name in ``/etc/spark-llm/profiles`` takes its place, or builds on it
with ``extends``.
"""

import re
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spark_llm.errors import ConfigError
from spark_llm.flags import refusal
from spark_llm.kv_cache import KV_DTYPES
from spark_llm.reason import Reason
from spark_llm.validation import explain, undecodable

DEMO_MODEL = "demo"
"""The model name that ``spark-llm demo-model`` stands behind: made here, never downloaded."""

Count = Annotated[int, Field(ge=1)]
Commit = Annotated[str, Field(pattern=r"^([0-9a-f]{40})?$")]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Engine(StrEnum):
    """Which build of vLLM a profile is for."""

    CUDA = "cuda"
    CPU = "cpu"


DEMOS = {Engine.CPU: "demo", Engine.CUDA: "demo-gpu"}
"""The profile of the demo model for each build."""


class Canary(_Table):
    """The question asked before ready, and what its answer must look like.

    Attributes:
        prompt: sent as one chat message, greedily decoded.
        max_tokens: length of the answer, in tokens.
        pattern: regular expression that the answer must contain (``re.search``); empty accepts any text.
        text: exact answer, where the build is pinned; empty means not checked.
        tool_call: a second request offers a tool that has to be called; needs a tool parser.
    """

    prompt: str = "What is the capital of France? Answer in one word."
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    pattern: str = ""
    text: str = ""
    tool_call: bool = False


class Backends(_Table):
    """Which kernels compute what.

    vLLM's own choice changes from release to release and was silently slow or wrong on GB10 more
    than once (vllm#48898, vllm#53836), so a CUDA profile names them.

    Attributes:
        attention: ``--attention-backend``.
        linear: ``--linear-backend``; layers that it has no kernel for use vLLM's order.
        moe: ``--moe-backend``; empty for dense models.
    """

    attention: str = ""
    linear: str = ""
    moe: str = ""

    @field_validator("*")
    @classmethod
    def _explicit(cls, value: str) -> str:
        if value.lower() == "auto":
            raise ValueError("name a backend: what auto picks changes with every engine release")
        return value


class Speculative(_Table):
    """Speculative decoding.

    Attributes:
        method: ``mtp`` (a module of the checkpoint or a draft trained for it), ``dflash``,
            ``dspark``, ``eagle3``, ``draft_model``,
            ``ngram``.
        tokens: draft tokens per step.
        model: ``ORG/NAME`` of the draft; empty if it is part of the model.
        revision: 40-hex commit of the draft.
        moe_backend: the draft's own ``moe_backend``; empty for none.
    """

    method: Literal["mtp", "dflash", "dspark", "eagle3", "draft_model", "ngram"]
    tokens: Annotated[int, Field(ge=1, le=16)]
    model: str = ""
    revision: Commit = ""
    moe_backend: str = ""

    @property
    def in_model(self) -> bool:
        """The draft is a module of the served checkpoint."""
        return self.method == "mtp" and not self.model

    @model_validator(mode="after")
    def _draft(self) -> Self:
        if self.method in {"dflash", "dspark", "eagle3", "draft_model"} and not self.model:
            raise ValueError(f"method {self.method} needs a model of its own")
        if self.method == "ngram" and self.model:
            raise ValueError("method ngram uses no model")
        return self


class Memory(_Table):
    """What must be known of a model before its files are there.

    Attributes:
        minimum_gb: smallest machine, as sold, that the profile is meant for, in GB per node.
        weights_bytes: size of the weights, in bytes; 0 for unknown. Used until the headers themselves can be read.
        weights_source: who says so.
    """

    minimum_gb: Annotated[int, Field(ge=0)] = 0
    weights_bytes: Annotated[int, Field(ge=0)] = 0
    weights_source: str = ""

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        if self.weights_bytes and not self.weights_source:
            raise ValueError("weights_bytes without weights_source")
        return self


class Status(_Table):
    """What is known of how it runs on a GB10.

    Attributes:
        kind: ``measured`` by this project on the hardware, ``published`` by others, ``untested``.
        decode_tokens_per_second: single stream; only with a source.
        source: who measured it, with which engine.
        note: what to know before relying on it.
    """

    kind: Literal["measured", "published", "untested"] = "untested"
    decode_tokens_per_second: Annotated[float, Field(gt=0)] | None = None
    source: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        if (self.kind != "untested" or self.decode_tokens_per_second) and not self.source:
            raise ValueError("a figure or a status other than untested needs its source")
        return self


class Profile(_Table):
    """One model and how it is served.

    Attributes:
        name: the file's name without ``.toml``.
        extends: profile that this one builds on; tables are merged key by key, lists replaced.
        description: one line for ``spark-llm profiles``.
        engine: which build of vLLM.
        model: ``ORG/NAME`` on the hub, a folder, or ``demo``.
        revision: 40-hex commit of the model; empty for local folders and the demo. On the hub,
            empty means that the first
            ``pull`` decides and its receipt pins it.
        quantization: of the weights, for people; vLLM reads it from the checkpoint.
        aliases: further names clients may ask for; ``default`` always works.
        nodes: machines that share the model by tensor parallelism.
        context: longest prompt plus answer, in tokens (``--max-model-len``).
        max_num_seqs: sequences decoded together.
        max_num_batched_tokens: tokens in one engine step.
        kv_cache_dtype: ``auto``, ``fp8``, ... (``--kv-cache-dtype``).
        kv_cache_bytes: size of the KV cache in bytes per node (``--kv-cache-memory-bytes``).
        block_size: tokens per KV block (``--block-size``); 0 takes vLLM's.
        state_dtype: of recurrent states (``--mamba-ssm-cache-dtype``); empty takes the model's.
        prefix_caching: reuse the KV cache of common prompt beginnings.
        eager: no CUDA graphs and no compiling; slow, for finding faults.
        load_format: ``--load-format``; empty takes vLLM's.
        tool_parser: ``--tool-call-parser``; empty for none.
        reasoning_parser: ``--reasoning-parser``; empty for none.
        backends: which kernels.
        speculative: speculative decoding; none unless given.
        flags: further engine flags, verbatim; none that a key of its own stands for or that the ledger cannot follow.
        environment: further environment variables of the engine.
        memory: what must be known beforehand.
        canary: the proof of correct tokens before ready.
        status: what is known of how it runs.
    """

    name: str
    extends: str = ""
    description: str
    engine: Engine = Engine.CUDA
    model: str
    revision: Commit = ""
    quantization: str = ""
    aliases: tuple[str, ...] = ()
    nodes: Annotated[int, Field(ge=1, le=2)] = 1
    context: Annotated[int, Field(ge=16)]
    max_num_seqs: Count
    max_num_batched_tokens: Count
    kv_cache_dtype: str = "auto"
    kv_cache_bytes: Count
    block_size: Annotated[int, Field(ge=0)] = 0
    state_dtype: Literal["", "float32", "float16", "bfloat16"] = ""
    prefix_caching: bool = True
    eager: bool = False
    load_format: str = ""
    tool_parser: str = ""
    reasoning_parser: str = ""
    backends: Backends = Backends()
    speculative: Speculative | None = None
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    memory: Memory = Memory()
    canary: Canary = Canary()
    status: Status = Status()

    @field_validator("kv_cache_dtype")
    @classmethod
    def _sizeable(cls, value: str) -> str:
        if value not in KV_DTYPES:
            raise ValueError(f"unknown KV cache dtype; known: {', '.join(KV_DTYPES)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for flag in self.flags:
            if why := refusal(flag):
                raise ValueError(f"flags contains {flag}; {why}")
        if self.engine is Engine.CUDA and not (self.backends.attention and self.backends.linear):
            raise ValueError("a CUDA profile names backends.attention and backends.linear")
        if self.canary.tool_call and not self.tool_parser:
            raise ValueError("canary.tool_call needs a tool_parser")
        turboquant = self.kv_cache_dtype.startswith("turboquant_")
        if turboquant and self.engine is Engine.CPU:
            raise ValueError("vLLM's CPU build ignores turboquant without a word")
        if turboquant != (self.backends.attention == "TURBOQUANT"):
            raise ValueError(
                "kv_cache_dtype turboquant_* and backends.attention TURBOQUANT go together"
            )
        return self


_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def shipped_folder() -> Path:
    """Where the shipped profiles lie: in the package once installed, beside it in a checkout."""
    packaged = Path(__file__).parent / "_data" / "profiles"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "profiles"


def load_profile(name: str, folders: tuple[Path, ...]) -> Profile:
    """Read the profile ``name`` from the first of ``folders`` that has it.

    ``extends`` is looked up in the same folders; a profile that extends its own name builds on the next folder's.

    Raises:
        ConfigError: no such profile, no UTF-8, no TOML, not a profile, or profiles that extend each other in a circle.
    """
    data, source = _merged(name, folders, ())
    return validate(name, data, source)


def _merged(
    name: str, folders: tuple[Path, ...], seen: tuple[Path, ...]
) -> tuple[dict[str, Any], Path]:
    path = _find(name, folders, seen)
    try:
        data = _toml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(undecodable(path, error), reason=Reason.BAD_PROFILE) from error
    base = data.get("extends")
    if not base:
        return data, path
    if not isinstance(base, str):
        raise ConfigError(f"{path}: key 'extends' is a profile's name", reason=Reason.BAD_PROFILE)
    below, _ = _merged(base, folders, (*seen, path))
    return _over(below, data), path


def _find(name: str, folders: tuple[Path, ...], seen: tuple[Path, ...]) -> Path:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a profile name",
            reason=Reason.UNKNOWN_PROFILE,
            hint="`spark-llm profiles` lists them.",
        )
    paths = [folder / f"{name}.toml" for folder in folders]
    there = [path for path in paths if path.is_file()]
    fresh = [path for path in there if path not in seen]
    if fresh:
        return fresh[0]
    if there:
        circle = " extends ".join(path.stem for path in (*seen, there[-1]))
        raise ConfigError(f"{seen[0]}: {circle}", reason=Reason.BAD_PROFILE)
    known = ", ".join(profile_names(folders)) or "none"
    raise ConfigError(
        f"no profile is named {name!r}",
        reason=Reason.UNKNOWN_PROFILE,
        hint=f"Known profiles: {known}.",
    )


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = (
            _over(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
        )
    return merged


def profile_names(folders: tuple[Path, ...]) -> list[str]:
    """Names of all profiles in ``folders``, sorted."""
    return sorted({path.stem for folder in folders for path in folder.glob("*.toml")})


def parse_profile(name: str, text: str, source: str) -> Profile:
    """Profile from TOML text that extends nothing.

    Raises:
        ConfigError: names the key and the nearest known one.
    """
    return validate(name, _toml(text, source), source)


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not TOML: {error}", reason=Reason.BAD_PROFILE) from error


def validate(name: str, data: Mapping[str, Any], source: Path | str) -> Profile:
    """Profile from parsed TOML.

    Raises:
        ConfigError: names each bad key.
    """
    try:
        return Profile.model_validate({**data, "name": name})
    except ValidationError as error:
        raise ConfigError(
            f"{source}: {explain(error, Profile)}", reason=Reason.BAD_PROFILE
        ) from error
