"""Profile and settings reference and the JSON schema, generated from the models and the shipped files.

``python -m spark_llm.reference docs/reference`` writes all; a test fails while they are stale.
"""

import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from spark_llm.config import Settings
from spark_llm.profile import Profile, load_profile, profile_names, shipped_folder
from spark_llm.reload import LIVE

SCHEMA = "profile.schema.json"
PAGE = "profiles.md"
SETTINGS_PAGE = "settings.md"


def schema() -> dict[str, Any]:
    """JSON schema of a profile file, for editors: ``#:schema profile.schema.json`` on the first line."""
    described = Profile.model_json_schema()
    described["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    described["title"] = "spark-llm profile"
    # The name is the file's, and what a profile extends may bring the required keys.
    described["properties"].pop("name")
    described.pop("required")
    _describe(described, Profile)
    for name, model in _tables(Profile):
        _describe(described["$defs"][model.__name__], model)
        described["$defs"][model.__name__]["title"] = name
    return described


def _describe(part: dict[str, Any], model: type[BaseModel]) -> None:
    part["description"] = _headline(model)
    for name, text in meanings(model).items():
        if name in part["properties"]:
            part["properties"][name]["description"] = text


def _headline(model: type[BaseModel]) -> str:
    return (inspect.getdoc(model) or "").partition("\n")[0]


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What each key means, from the ``Attributes:`` of the docstring."""
    _, _, section = (inspect.getdoc(model) or "").partition("Attributes:")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            name = match[1]
            found[name] = match[2].strip()
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def _tables(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield name, part


def page() -> str:
    """``docs/reference/profiles.md``."""
    folders = (shipped_folder(),)
    profiles = [load_profile(name, folders) for name in profile_names(folders)]
    return "\n".join(
        [
            "# Profiles",
            "",
            "<!-- Generated: python -m spark_llm.reference docs/reference -->",
            "",
            "A profile is a TOML file that says what to serve and how. `spark-llm profiles` lists them,",
            "`spark-llm fit NAME` says whether one fits, `spark-llm serve --profile NAME` serves it.",
            "",
            "No shipped profile has run on a GB10 in this project. Figures were published by others, with other",
            "engines; the source stands beside each.",
            "",
            "## Shipped",
            "",
            *_shipped(profiles),
            "",
            "A profile for two nodes is data for later: this version serves from one machine and refuses it (`peers`).",
            "",
            "## Your own",
            "",
            "Put a file into `/etc/spark-llm/profiles/`. It takes the place of a shipped one of the same name, or",
            "changes single keys of it:",
            "",
            "```toml",
            "# /etc/spark-llm/profiles/qwen3.6-35b-a3b-nvfp4.toml",
            'extends = "qwen3.6-35b-a3b-nvfp4"',
            "context = 65536",
            "kv_cache_bytes = 8589934592 # 8 GiB",
            "```",
            "",
            "Tables are merged key by key, lists are replaced. `spark-llm fit NAME` checks the result. A key that",
            "does not exist, a flag that contradicts a key, a context above the model's, or a KV cache below one",
            "sequence is refused by name before anything starts.",
            "",
            "For completion in an editor, put `#:schema profile.schema.json` on the first line; the schema is",
            f"[{SCHEMA}]({SCHEMA}).",
            "",
            "## Keys",
            "",
            *_keys(Profile),
            *(line for name, model in _tables(Profile) for line in _section(name, model)),
        ]
    )


def settings_page() -> str:
    """``docs/reference/settings.md``."""
    lines = [
        "# Settings",
        "",
        "<!-- Generated: python -m spark_llm.reference docs/reference -->",
        "",
        "Read from `/etc/spark-llm/config.toml` (or `--config`, or `$SPARK_LLM_CONFIG`). A flag beats the",
        "environment, the environment beats the file: `[gateway] port = 8000` is `SPARK_LLM_GATEWAY__PORT=8000`.",
        "An unknown key is an error that names the nearest known one. Keys marked ⟳ are taken up by",
        "`systemctl reload spark-llm` (SIGHUP).",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
        "| `profile` | - | what to serve; unset, the demo that suits the engine: `demo-gpu` on a GPU, else `demo` |",
    ]
    for name, model in _tables(Settings):
        lines += [
            "",
            f"## [{name}]",
            "",
            _headline(model),
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        means = meanings(model)
        for key, field in model.model_fields.items():
            mark = " ⟳" if f"{name}.{key}" in LIVE else ""
            text = means[key].replace("``", "`")
            lines.append(f"| `{key}`{mark} | {_default(field)} | {text} |")
    return "\n".join([*lines, ""])


def _shipped(profiles: list[Profile]) -> Iterator[str]:
    yield "| name | what | machine | context | KV cache | tok/s, one stream | source |"
    yield "|---|---|---|---|---|---|---|"
    for item in profiles:
        size = item.memory.minimum_gb
        machine = f"{item.nodes} x {size} GB" if item.nodes > 1 else f"{size} GB" if size else "any"
        speed = item.status.decode_tokens_per_second
        cells = (
            f"`{item.name}`",
            item.description,
            machine,
            str(item.context),
            f"{item.kv_cache_bytes / 2**30:.3g} GiB {item.kv_cache_dtype}",
            f"{speed:g}" if speed else "-",
            ". ".join(filter(None, (item.status.source, item.status.note))) or item.status.kind,
        )
        yield f"| {' | '.join(cells)} |"


def _section(name: str, model: type[BaseModel]) -> Iterator[str]:
    yield f"### `[{name}]`"
    yield ""
    yield _headline(model)
    yield ""
    yield from _keys(model)


def _keys(model: type[BaseModel]) -> Iterator[str]:
    known = meanings(model)
    tables = {name for name, _ in _tables(model)}
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    for name, field in model.model_fields.items():
        if name != "name" and name not in tables:
            yield f"| `{name}` | {_default(field)} | {known[name].replace('``', '`')} |"
    yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in ("", (), {}, None):
        return "-"
    return f"`{json.dumps(value)}`"


def main(folder: Path) -> None:
    """Write all files into ``folder``."""
    (folder / SCHEMA).write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page(), encoding="utf-8")
    (folder / SETTINGS_PAGE).write_text(settings_page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
