"""A small, seeded Qwen3 model with its own tokenizer: real files, no download, the same bytes on every run.

Its weights are random, so its text is noise. It exists to show that the whole path works on a machine without a Spark:
loading, tokenizing, chat template, prefill, decode, streaming.
"""

import itertools
import json
import os
import random
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from spark_llm.errors import RefusedError
from spark_llm.reason import Reason

SEED = 20261121
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 128, 2, 4, 2, 32, 256
CONTEXT = 4096
DEFAULT_ANSWER_TOKENS = 128

_WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you
were all her she there would their we him been has when who will no more if out so up said what its about than into them
can only other time new some could these two may first then do any like my now over such our man me even most made after
also did many off before must well back through years much where your way down should because long each just state those
people too mr how little good world make very year still see own work men day get here old life both between being under
three never know same last another while us might great states go come since against right came take used himself few
house american use place during high without again home around small however found mrs part school thought went say
spark token model memory kernel cache stream decode prefill gate engine bytes speed light wind river stone cloud night
""".split()  # noqa: SIM905  a list of 200 literals would be 200 lines

_END_OF_TEXT, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def write_demo_model(folder: Path) -> None:
    """Write the demo model into ``folder``, which appears whole or not at all.

    A folder that already holds this very model is left as it is.

    Raises:
        RefusedError: ``folder`` exists and holds something else.
    """
    files = _files()
    if folder.exists():
        if _holds(folder, files):
            return
        raise RefusedError(
            f"{folder} exists and is not the demo model",
            reason=Reason.MODEL_INCOMPLETE,
            hint="Name another folder, or remove this one.",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not _holds(folder, files):  # another start wrote the same meanwhile: so be it
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _holds(folder: Path, files: dict[str, bytes]) -> bool:
    try:
        return {entry.name for entry in os.scandir(folder)} == files.keys() and all(
            (folder / name).read_bytes() == content for name, content in files.items()
        )
    except OSError:
        return False


def _files() -> dict[str, bytes]:
    tokens, merges = _vocabulary()
    return {
        "config.json": _json(_config(len(tokens))),
        "generation_config.json": _json(
            {
                "bos_token_id": tokens[_END_OF_TEXT],
                "do_sample": True,
                "eos_token_id": [tokens[_END], tokens[_END_OF_TEXT]],
                "max_new_tokens": DEFAULT_ANSWER_TOKENS,
                "pad_token_id": tokens[_END_OF_TEXT],
            }
        ),
        "model.safetensors": _weights(tokens),
        "tokenizer.json": _json(_tokenizer(tokens, merges)),
        "tokenizer_config.json": _json(
            {
                "chat_template": _CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
                "eos_token": _END,
                "model_max_length": CONTEXT,
                "pad_token": _END_OF_TEXT,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        ),
    }


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n"


def _config(vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": vocabulary - 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": CONTEXT,
        "max_window_layers": LAYERS,
        "model_type": "qwen3",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes as (GPT-2's table), in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = itertools.count(0x100)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _vocabulary() -> tuple[dict[str, int], list[list[str]]]:
    """Token ids and merges: all bytes, then the prefixes that build each word, then the special tokens."""
    alphabet = _byte_alphabet()
    space = alphabet[ord(" ")]
    tokens = {token: index for index, token in enumerate(alphabet)}
    merges: list[list[str]] = []
    for word in dict.fromkeys(_WORDS):
        left = space
        for letter in word:
            if left + letter not in tokens:
                tokens[left + letter] = len(tokens)
                merges.append([left, letter])
            left += letter
    for special in (_END_OF_TEXT, _START, _END):
        tokens[special] = len(tokens)
    return tokens, merges


def _tokenizer(tokens: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    byte_level = {
        "add_prefix_space": False,
        "trim_offsets": True,
        "type": "ByteLevel",
        "use_regex": True,
    }
    special = (_END_OF_TEXT, _START, _END)
    return {
        "added_tokens": [
            {
                "content": token,
                "id": tokens[token],
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in special
        ],
        "decoder": byte_level,
        "model": {
            "byte_fallback": False,
            "continuing_subword_prefix": None,
            "dropout": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "ignore_merges": False,
            "merges": merges,
            "type": "BPE",
            "unk_token": None,
            "vocab": {token: index for token, index in tokens.items() if token not in special},
        },
        "normalizer": None,
        "padding": None,
        "post_processor": byte_level,
        "pre_tokenizer": byte_level,
        "truncation": None,
        "version": "1.0",
    }


def _weights(tokens: dict[str, int]) -> bytes:
    source = random.Random(SEED)  # noqa: S311  noise for weights, no secret
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = bytearray()

    def add(name: str, shape: list[int], data: bytes) -> None:
        end = len(body) + len(data)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(body), end]}
        body.extend(data)

    def noise(name: str, rows: int, columns: int, exponent: int = _UNIT_GAIN) -> None:
        add(name, [rows, columns], _bf16_noise(source.randbytes(rows * columns), exponent))

    def ones(name: str, size: int) -> None:
        add(name, [size], b"\x80\x3f" * size)

    noise("model.embed_tokens.weight", len(tokens), HIDDEN, exponent=126)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        ones(f"{at}.input_layernorm.weight", HIDDEN)
        noise(f"{at}.self_attn.q_proj.weight", HEADS * HEAD_DIM, HIDDEN)
        noise(f"{at}.self_attn.k_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        noise(f"{at}.self_attn.v_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        ones(f"{at}.self_attn.q_norm.weight", HEAD_DIM)
        ones(f"{at}.self_attn.k_norm.weight", HEAD_DIM)
        noise(f"{at}.self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_DIM)
        ones(f"{at}.post_attention_layernorm.weight", HIDDEN)
        noise(f"{at}.mlp.gate_proj.weight", INTERMEDIATE, HIDDEN)
        noise(f"{at}.mlp.up_proj.weight", INTERMEDIATE, HIDDEN)
        noise(f"{at}.mlp.down_proj.weight", HIDDEN, INTERMEDIATE)
    ones("model.norm.weight", HIDDEN)
    add("lm_head.weight", [len(tokens), HIDDEN], _head(source, tokens))
    return _safetensors(header, bytes(body))


def _safetensors(header: dict[str, Any], body: bytes) -> bytes:
    """The safetensors layout: u64 header length, JSON header padded to 8 bytes, tensor data.

    Written here because the library's own ``serialize`` takes raw addresses of tensors in memory.
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


_UNIT_GAIN = 123
"""bf16 exponent of values in ±[2⁻⁴, 2⁻³): over 128 inputs their root mean square gain is about one."""


def _bf16_noise(raw: bytes, exponent: int) -> bytes:
    """One little-endian bf16 per byte of ``raw``: random sign and mantissa, magnitude in [2^e, 2^(e+1)).

    ``exponent`` is the biased exponent, e + 127.
    """
    low = bytes(((exponent & 1) << 7) | (byte & 0x7F) for byte in range(256))
    high = bytes((byte & 0x80) | (exponent >> 1) for byte in range(256))
    out = bytearray(2 * len(raw))
    out[0::2] = raw.translate(low)
    out[1::2] = raw.translate(high)
    return bytes(out)


def _head(source: random.Random, tokens: dict[str, int]) -> bytes:
    """Output rows: noise for whole words, zero for all else, so that the noise is at least made of words."""
    space = _byte_alphabet()[ord(" ")]
    words = {space + word for word in _WORDS}
    rows = []
    for token in tokens:
        row = _bf16_noise(source.randbytes(HIDDEN), exponent=126)
        rows.append(row if token in words else bytes(2 * HIDDEN))
    return b"".join(rows)
