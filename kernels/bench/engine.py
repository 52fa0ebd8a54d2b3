"""The plugin in a real vLLM: the same model with kernels off and on, CUDA graphs on, in one run.

    python engine.py model DIR                     # writes a seeded random model of about 5 B parameters
    python engine.py compare DIR OUT               # one engine process a variant; OUT/engine.json and a table
    python engine.py compare DIR OUT --compile     # the same with torch.compile, as profiles are served
    python engine.py compare DIR OUT --gpus 2      # by tensor parallelism; GPU time is not read then

The model is Qwen3-shaped with BF16 attention and head and NVFP4 (weight-only) MLPs. Its head's rows
point at a permutation of the embeddings, so that its logits are as peaked as a trained model's: with
flat random logits two correct engines part at the first near-tie.
"""

# ruff: noqa: PLC0415 - a command imports torch or vLLM only when it needs it
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = (
    4096,
    12288,
    20,
    32,
    8,
    128,
    151936,
)
SEED = 20261121
# name -> (SPARK_KERNELS, all bf16x tiles stored plain: same sums, no code)
VARIANTS = {
    "off": ("off", False),
    "off, again": ("off", False),
    "bf16x": ("force,bf16x", False),
    "bf16x, tiles plain": ("force,bf16x", True),
    "lm_head": ("force,lm_head", False),
    "bf16x + lm_head": ("force,bf16x,lm_head", False),
    "bf16x + lm_head + nvfp4": ("force,bf16x,lm_head,nvfp4", False),
}
PROMPT, SHORT, LONG, REPEATS = 64, 32, 160, 3


def write_model(folder: Path) -> None:
    """Write config.json and one safetensors file; needs a GPU for speed alone."""
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device) * std

    def nvfp4(name: str, n: int, k: int) -> None:
        codes = torch.randint(
            0, 256, (n, k // 2), generator=generator, device=device, dtype=torch.uint8
        )
        scale = torch.rand(n, k // 16, generator=generator, device=device) * 200 + 40
        tensors[f"{name}.weight_packed"] = codes.cpu()
        tensors[f"{name}.weight_scale"] = scale.to(torch.float8_e4m3fn).cpu()
        # A code's rms is 3.3 and a scale's 150: the divisor brings the weight's rms to k ** -0.5.
        tensors[f"{name}.weight_global_scale"] = torch.tensor([3.3 * 150 * k**0.5])

    embedding = normal(VOCABULARY, HIDDEN, std=1.0).bfloat16()
    permutation = torch.randperm(VOCABULARY, generator=generator, device=device)
    head = embedding[permutation].float() * 0.02 + normal(VOCABULARY, HIDDEN, std=0.02)
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = (
        embedding.cpu(),
        head.bfloat16().cpu(),
    )
    tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, n, k in (
            ("q_proj", HEADS * HEAD_DIM, HIDDEN),
            ("k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("o_proj", HIDDEN, HEADS * HEAD_DIM),
        ):
            tensors[f"{layer}.self_attn.{name}.weight"] = normal(n, k, std=k**-0.5).bfloat16().cpu()
        nvfp4(f"{layer}.mlp.gate_proj", INTERMEDIATE, HIDDEN)
        nvfp4(f"{layer}.mlp.up_proj", INTERMEDIATE, HIDDEN)
        nvfp4(f"{layer}.mlp.down_proj", HIDDEN, INTERMEDIATE)
        for name, width in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)):
            tensors[f"{layer}.{name}.weight"] = torch.ones(width).bfloat16()
        for name in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{name}.weight"] = torch.ones(HEAD_DIM).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
        "dynamic": False,
    }
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
        "bos_token_id": 0,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None,
                    "output_activations": None,
                }
            },
            "ignore": ["re:.*self_attn.*", "lm_head"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    count = sum(
        t.numel() * (2 if name.endswith("packed") else 1)
        for name, t in tensors.items()
        if "scale" not in name
    )
    print(f"{count / 1e9:.2f} B parameters, {sum(t.nbytes for t in tensors.values()) / 1e9:.2f} GB")


def store_tiles_plain() -> None:
    """Make the plugin store every tile as bf16, whatever it costs."""
    from spark_kernels.bf16x import api, selection

    encode = api.encode
    api.encode = lambda weight: encode(weight, force_plain=True)
    selection.Selection.worth = lambda self, coded, plain: True  # noqa: ARG005


def gpu_busy_s(run: Callable[[], object]) -> float:
    """Return the seconds in which at least one kernel ran: free of what the host does between steps.

    Kernels that start before their predecessor's end (programmatic dependent launch) count once.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    busy = until = 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy * 1e-6


def run_variant(folder: Path, name: str, *, compiled: bool, gpus: int) -> dict[str, Any]:
    """Serve the model in this process and measure; SPARK_KERNELS is set by the caller."""
    import torch

    if VARIANTS[name][1]:
        store_tiles_plain()
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.6,
        enable_prefix_caching=False,
        compilation_config={
            "mode": 3 if compiled else 0,  # CompilationMode.VLLM_COMPILE, NONE
            "cudagraph_mode": "FULL_AND_PIECEWISE" if compiled else "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8],
        },
        linear_backend="marlin",  # what vLLM picks for weight-only NVFP4 on SM 12.1; its choice for SM 9.0 is another
        disable_log_stats=True,
        tensor_parallel_size=gpus,
        disable_custom_all_reduce=True,  # NCCL alone: every machine has it
    )
    loaded = time.perf_counter() - started
    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(1, VOCABULARY, (8, PROMPT), generator=generator).tolist()

    def generate(batch: list[list[int]], length: int, **extra: Any) -> tuple[float, list[Any]]:  # noqa: ANN401
        params = SamplingParams(
            temperature=0,
            max_tokens=length,
            min_tokens=0,
            ignore_eos=True,
            detokenize=False,
            **extra,
        )
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in batch], params, use_tqdm=False)
        return time.perf_counter() - start, [o.outputs[0] for o in outputs]

    result: dict[str, Any] = {
        "variant": name,
        "load_s": loaded,
        "repeats_equal": True,
        "decode": {},
        "gpu_ms_per_step": {},
        "tokens": {},
    }
    if gpus == 1:  # otherwise the question would have to be pickled
        result["resident_bytes"] = llm.apply_model(
            lambda m: sum(t.untyped_storage().nbytes() for t in {*m.parameters(), *m.buffers()})
        )[0]
    for batch in (1, 4, 8):
        generate(prompts[:batch], SHORT)
        rates, tokens = [], []
        for _ in range(REPEATS):
            short, _ = generate(prompts[:batch], SHORT)
            long, outputs = generate(prompts[:batch], LONG)
            rates.append(batch * (LONG - SHORT) / (long - short))
            tokens.append([list(o.token_ids) for o in outputs])
        result["repeats_equal"] &= all(t == tokens[0] for t in tokens)
        result["decode"][batch] = {
            "tok_s": statistics.median(rates),
            "min": min(rates),
            "max": max(rates),
        }
        result["tokens"][batch] = tokens[0]
        if gpus > 1:  # the kernels run in other processes
            continue
        short, long = (
            gpu_busy_s(partial(generate, prompts[:batch], n)) for n in (SHORT, LONG // 2)
        )
        result["gpu_ms_per_step"][batch] = (long - short) / (LONG // 2 - SHORT) * 1e3
    _, scored = generate(prompts[:4], SHORT, logprobs=4)
    result["logprobs"] = [
        [sorted((t, p.logprob) for t, p in step.items()) for step in o.logprobs] for o in scored
    ]
    flat = torch.randint(1, VOCABULARY, (1, 2000), generator=generator).tolist()
    generate(flat, 1)
    result["prefill_2000_s"] = min(generate(flat, 1)[0] for _ in range(3))
    return result


def compare(folder: Path, out: Path, variants: list[str], options: list[str]) -> None:
    """Run the variants one after the other, with ``options`` for each, and print their ratios to ``off``."""
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in variants:
        path = out / f"{name.replace(' ', '').replace('+', '-').replace(',', '-')}.json"
        # In one process every variant sees the same batches, so equal sums give equal bits.
        env = {
            **os.environ,
            "SPARK_KERNELS": VARIANTS[name][0],
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        }
        with (path.with_suffix(".log")).open("w") as log:
            done = subprocess.run(
                [sys.executable, __file__, "variant", str(folder), name, str(path), *options],
                env=env,
                stdout=log,
                stderr=log,
                check=False,
            )
        if done.returncode:
            print(
                f"{name}: exit {done.returncode}\n" + path.with_suffix(".log").read_text()[-3000:],
                flush=True,
            )
            continue
        results[name] = json.loads(path.read_text())
        print(summary(results[name], results.get("off")), flush=True)
        path.unlink()
    if {"bf16x", "bf16x, tiles plain"} <= results.keys():
        a, b = results["bf16x"], results["bf16x, tiles plain"]
        same = {
            "tokens": a["tokens"] == b["tokens"],
            "logprobs_bit_for_bit": a["logprobs"] == b["logprobs"],
        }
        print("coded = plain tiles:", same)
        a["equal_to_plain_tiles"] = same
    for result in results.values():
        del result["tokens"], result["logprobs"]
    (out / "engine.json").write_text(json.dumps(results, indent=1))


def summary(result: dict[str, Any], off: dict[str, Any] | None) -> str:
    """Return one line: resident bytes, decode rates and their ratios, equal tokens, prefill."""
    parts = [f"{result['variant']}: load {result['load_s']:.0f} s"]
    if resident := result.get("resident_bytes"):
        parts.append(f"{resident / 1e9:.3f} GB resident")
    for batch, rate in result["decode"].items():
        ratio = f" x{rate['tok_s'] / off['decode'][batch]['tok_s']:.3f}" if off else ""
        parts.append(
            f"batch {batch}: {rate['tok_s']:.1f} ({rate['min']:.1f}-{rate['max']:.1f}) tok/s{ratio}"
        )
        if step := result["gpu_ms_per_step"].get(batch):
            ratio = f" x{off['gpu_ms_per_step'][batch] / step:.3f}" if off else ""
            parts.append(f"GPU {step:.3f} ms a step{ratio}")
    parts.append(f"repeats equal: {result['repeats_equal']}")
    if off:
        sequences = [
            (p, q)
            for b in off["tokens"]
            for p, q in zip(off["tokens"][b], result["tokens"][b], strict=True)
        ]
        until = [
            next((i for i, (x, y) in enumerate(zip(p, q, strict=True)) if x != y), LONG)
            for p, q in sequences
        ]
        equal = until.count(LONG)
        parts.append(f"equal to off: {equal} of {len(until)} sequences of {LONG} tokens")
        parts.append(f"{sum(until)} tokens before the first that differs")
        steps = [
            (x, y)
            for p, q in zip(off["logprobs"], result["logprobs"], strict=True)
            for x, y in zip(p, q, strict=True)
        ]
        same = [
            abs(u[1] - v[1])
            for x, y in steps
            for u, v in zip(x, y, strict=True)
            if [t for t, _ in x] == [t for t, _ in y]
        ]
        parts.append(
            f"largest difference of a log probability {max(same, default=float('nan')):.4f}"
        )
        result["sequences_equal"], result["tokens_until_difference"] = until.count(LONG), sum(until)
    parts.append(f"prefill of 2000: {result['prefill_2000_s'] * 1e3:.1f} ms")
    return "; ".join(parts)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub = parser.add_subparsers(dest="command", required=True)
    for name, extra in (("model", []), ("compare", ["out"]), ("variant", ["name", "out"])):
        command = sub.add_parser(name)
        command.add_argument("folder", type=Path)
        for argument in extra:
            command.add_argument(argument)
        if name != "model":
            command.add_argument("--compile", action="store_true")
            command.add_argument("--gpus", type=int, default=1)
        if name == "compare":
            command.add_argument(
                "--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS)
            )
    args = parser.parse_args()
    if args.command == "model":
        write_model(args.folder)
    elif args.command == "compare":
        options = [f"--gpus={args.gpus}", *["--compile"] * args.compile]
        compare(args.folder, Path(args.out), args.variants, options)
    else:
        Path(args.out).write_text(
            json.dumps(run_variant(args.folder, args.name, compiled=args.compile, gpus=args.gpus))
        )


if __name__ == "__main__":
    main()
