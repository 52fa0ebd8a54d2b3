"""Profiles: what is refused, what builds on what, and what the shipped ones promise."""

import re
from pathlib import Path

import pytest
from spark_llm.errors import ConfigError
from spark_llm.profile import (
    DEMO_MODEL,
    Engine,
    load_profile,
    parse_profile,
    profile_names,
    shipped_folder,
)
from spark_llm.reason import Reason
from spark_llm.switches import TURBOQUANT, adjust

FOLDERS = (shipped_folder(),)
NAMES = profile_names(FOLDERS)

BASE = """
description = "d"
model = "org/name"
context = 4096
max_num_seqs = 4
max_num_batched_tokens = 2048
kv_cache_bytes = 1073741824
[backends]
attention = "FLASHINFER"
linear = "cutlass"
"""

REFUSED = [
    ("unknown key", "contxt = 5\n" + BASE, "did you mean 'context'"),
    ("unknown nested key", BASE + "atention = 'X'\n", "did you mean 'attention'"),
    ("missing key", BASE.replace('model = "org/name"\n', ""), "'model' is missing"),
    ("no TOML", "context = = 5", "not TOML"),
    (
        "a flag with a key of its own",
        "flags = ['--max-model-len=5']\n" + BASE,
        "use the key 'context'",
    ),
    (
        "the same with underscores",
        "flags = ['--max_model_len', '5']\n" + BASE,
        "use the key 'context'",
    ),
    ("a file of flags", "flags = ['--config', 'x.yaml']\n" + BASE, "one by one"),
    ("two ways to eager", "flags = ['--enforce-eager']\n" + BASE, "use the key 'eager'"),
    ("a door past the gateway", "flags = ['--port', '9']\n" + BASE, "gateway.port"),
    ("auto backend", BASE.replace("FLASHINFER", "auto"), "name a backend"),
    ("no backend", BASE.replace('linear = "cutlass"\n', ""), "backends.linear"),
    ("short commit", "revision = '1355db6a'\n" + BASE, "revision"),
    (
        "draft without a model",
        BASE + "[speculative]\nmethod = 'dflash'\ntokens = 4\n",
        "needs a model",
    ),
    (
        "ngram with a model",
        BASE + "[speculative]\nmethod='ngram'\ntokens=4\nmodel='a/b'\n",
        "uses no model",
    ),
    ("tool canary without a parser", BASE + "[canary]\ntool_call = true\n", "needs a tool_parser"),
    ("figure without a source", BASE + "[status]\ndecode_tokens_per_second = 5.0\n", "source"),
    ("published without a source", BASE + "[status]\nkind = 'published'\n", "source"),
    ("weights without a source", BASE + "[memory]\nweights_bytes = 5\n", "weights_source"),
    ("turboquant on another backend", "kv_cache_dtype = 'turboquant_k8v4'\n" + BASE, "go together"),
    ("unknown KV dtype", "kv_cache_dtype = 'fp7'\n" + BASE, "unknown KV cache dtype"),
    ("three nodes", "nodes = 3\n" + BASE, "nodes"),
    ("no room for a token", BASE.replace("1073741824", "0"), "kv_cache_bytes"),
]


@pytest.mark.parametrize(
    ("text", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_bad_profile_is_refused_by_name(text: str, says: str) -> None:
    """Each mistake is an error that names the key and what to do, before anything starts."""
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        parse_profile("x", text, "x.toml")
    assert caught.value.reason is Reason.BAD_PROFILE
    assert "x.toml" in caught.value.message


def test_good_profile_is_accepted() -> None:
    """The text that the mistakes above are made in is a profile itself."""
    assert parse_profile("x", BASE, "x.toml").context == 4096


def test_owner_extends_a_shipped_profile_of_the_same_name(tmp_path: Path) -> None:
    """A file in /etc changes single keys of the shipped profile; tables are merged, lists replaced."""
    owner = tmp_path / "etc"
    owner.mkdir()
    (owner / "gpt-oss-20b.toml").write_text(
        'extends = "gpt-oss-20b"\ncontext = 8192\naliases = ["mine"]\n[canary]\nmax_tokens = 99\n'
    )
    merged = load_profile("gpt-oss-20b", (owner, *FOLDERS))
    shipped = load_profile("gpt-oss-20b", FOLDERS)
    assert (merged.context, merged.aliases, merged.canary.max_tokens) == (8192, ("mine",), 99)
    assert merged.canary.pattern == shipped.canary.pattern
    assert merged.model == shipped.model


def test_extending_in_a_circle_is_refused(tmp_path: Path) -> None:
    """Profiles that extend each other are named in the error."""
    (tmp_path / "a.toml").write_text('extends = "b"')
    (tmp_path / "b.toml").write_text('extends = "a"')
    with pytest.raises(ConfigError, match="a extends b extends a"):
        load_profile("a", (tmp_path,))


@pytest.mark.parametrize("name", ["../demo", "Demo", "", "a/b", "-x"])
def test_name_cannot_leave_the_folder(name: str) -> None:
    """A name is a file's name and nothing else."""
    with pytest.raises(ConfigError, match="not a profile name"):
        load_profile(name, FOLDERS)


def test_unknown_profile_lists_the_known() -> None:
    """A mistyped name is answered with the names there are."""
    with pytest.raises(ConfigError) as caught:
        load_profile("demo2", FOLDERS)
    assert "demo" in caught.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profile_keeps_the_house_rules(name: str) -> None:
    """Shipped profiles name their commit or say why not, claim no measurement, and prove an answer before ready."""
    profile = load_profile(name, FOLDERS)
    assert profile.status.kind != "measured", "nothing has run on the hardware"
    assert profile.canary.pattern
    if profile.engine is Engine.CUDA:
        assert profile.memory.minimum_gb in {64, 128}
        made_here = profile.model == DEMO_MODEL
        assert profile.revision or made_here or profile.model.startswith("DevQuasar/"), (
            "no commit is known for it"
        )
        assert profile.environment.keys().isdisjoint({"HF_TOKEN", "HF_HUB_OFFLINE"})


def test_served_names_are_unique() -> None:
    """No two shipped profiles answer to the same alias."""
    aliases = [alias for name in NAMES for alias in load_profile(name, FOLDERS).aliases]
    assert len(aliases) == len(set(aliases))
    assert set(aliases).isdisjoint(set(NAMES) - {"demo"})


def test_switches() -> None:
    """Each switch changes its keys and nothing else."""
    profile = load_profile("qwen3.6-35b-a3b-nvfp4", FOLDERS)
    assert adjust(profile) == profile
    assert adjust(profile, debug=True) == profile.model_copy(update={"eager": True})
    assert adjust(profile, context=1024).context == 1024
    assert adjust(profile, mtp=False).speculative is None
    assert adjust(profile, mtp=True) == profile
    packed = adjust(profile, turboquant=True)
    assert (packed.kv_cache_dtype, packed.backends.attention) == (TURBOQUANT, "TURBOQUANT")
    assert packed.backends.moe == profile.backends.moe


def test_switch_that_contradicts_is_refused() -> None:
    """MTP where the profile has no draft, and TurboQuant on the CPU, are refused by name."""
    with pytest.raises(ConfigError, match=r"no \[speculative\]"):
        adjust(load_profile("gpt-oss-20b", FOLDERS), mtp=True)
    with pytest.raises(ConfigError, match="CPU build ignores turboquant"):
        adjust(load_profile("demo", FOLDERS), turboquant=True)


def test_profile_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """A profile in another encoding than UTF-8 is refused with its file and the place."""
    (tmp_path / "latin.toml").write_bytes('description = "é"'.encode("latin-1"))
    with pytest.raises(
        ConfigError, match=r"latin\.toml is not UTF-8: 0xe9 at byte offset 15"
    ) as no:
        load_profile("latin", (tmp_path,))
    assert no.value.reason is Reason.BAD_PROFILE
