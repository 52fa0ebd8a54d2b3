"""The padding of MXFP4 experts against vLLM's own function."""

import json
import os
import subprocess
from pathlib import Path

from spark_llm.architecture import read_architecture
from spark_llm.padding import expert_growth

PYTHON = Path(__file__).parents[2] / ".venv-engine" / "bin" / "python"
PROBE = """
import json
from vllm.model_executor.layers.fused_moe.oracle import mxfp4
sizes = [(2880, 2880), (2880, 1440), (3072, 1536), (2048, 704)]
names = ("marlin", "flashinfer_trtllm", "flashinfer_cutlass", "triton")
answer = [
    (name, size, mxfp4.mxfp4_round_up_hidden_size_and_intermediate_size(backend, *size))
    for name in names for backend in mxfp4.map_mxfp4_backend(name) for size in sizes
]
print(json.dumps(answer))
"""


def test_padding_is_the_engines(tmp_path: Path) -> None:
    """For each backend of a CUDA build and several sizes the factor is what the engine rounds up to."""
    done = subprocess.run(
        [PYTHON, "-c", PROBE],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    for backend, (hidden, width), (across, along) in json.loads(done.stdout.splitlines()[-1]):
        architecture = read_architecture(
            {
                "model_type": "gpt_oss",
                "num_hidden_layers": 1,
                "num_attention_heads": 64,
                "head_dim": 64,
                "hidden_size": hidden,
                "intermediate_size": width,
                "num_experts": 32,
                "num_experts_per_tok": 4,
                "quantization_config": {"quant_method": "mxfp4"},
            }
        )
        grown = expert_growth(architecture, backend, 1)
        assert grown == across * along / (hidden * width), (backend, hidden, width)
