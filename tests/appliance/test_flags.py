"""Engine flags that a profile may not set, in every spelling that the engine takes."""

import pytest
from spark_llm.flags import refusal
from spark_llm.profile import load_profile, profile_names, shipped_folder

EVASIONS = [
    ("--max_model_len", "'context'"),
    ("--max-model-len=1000000", "'context'"),
    ("--kv_cache-memory_bytes=5", "'kv_cache_bytes'"),
    ("--num-gpu-blocks-override", "'kv_cache_bytes'"),
    ("--device-memory-utilization", "'kv_cache_bytes'"),
    ("--gpu-mem", "'kv_cache_bytes'"),
    ("--max-num-s=256", "'max_num_seqs'"),
    ("--kv-cache-dtype", "'kv_cache_dtype'"),
    ("--no-enforce", "'eager'"),
    ("--speculative-config.num_speculative_tokens", "'speculative'"),
    ("--speculative_config.method=ngram", "'speculative'"),
    ("-sc.num_speculative_tokens", "'speculative'"),
    ("--spec-tokens", "'speculative'"),
    ("-tp=2", "'nodes'"),
    ("-t", "'nodes'"),
    ("-n2", "'nodes'"),
    ("--config", "one by one"),
    ("--cpu_offload_gb=20", "unified"),
    ("--kv-offloading-size", "unified"),
    ("--kv-transfer-config.kv_connector", "unified"),
]


@pytest.mark.parametrize(("argument", "says"), EVASIONS)
def test_counted_flag_is_refused_in_any_spelling(argument: str, says: str) -> None:
    """Underscores, values, keys of a table and beginnings are the flag itself."""
    assert says in refusal(argument)


@pytest.mark.parametrize(
    "argument",
    ["--async-scheduling", "--kernel-config", '{"max-model-len":5}', "5", "-1", "-dc", "--model-impl", "0.5"],
)  # fmt: skip
def test_other_flags_and_values_pass(argument: str) -> None:
    """What nothing stands for is passed on, also where its name only begins like a counted one."""
    assert refusal(argument) == ""


def test_shipped_profiles_set_nothing_counted() -> None:
    """No shipped profile contains a flag of this kind."""
    for name in profile_names((shipped_folder(),)):
        profile = load_profile(name, (shipped_folder(),))
        assert not any(map(refusal, profile.flags))
