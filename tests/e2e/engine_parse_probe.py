"""Parses engine command lines with vLLM's own parser and checks their environment against its own list.

Run by the engine's own interpreter: ``python engine_parse_probe.py IN.json OUT.json``. Nothing is
configured for a device, so
flags of the CUDA build are parsed by the CPU build just as well: both have the same Python code.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def parse(arguments: list[str], environment: dict[str, str]) -> dict[str, object]:
    parser = make_arg_parser(FlexibleArgumentParser())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = parser.parse_args(arguments)
            validate_parsed_serve_args(parsed)
            engine = AsyncEngineArgs.from_cli_args(parsed)
        if parsed.attention_backend:
            AttentionBackendEnum[parsed.attention_backend]
    except SystemExit:
        return {"error": said.getvalue()}
    except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
        return {"error": repr(error)}
    unknown = [
        name
        for name in environment
        if name.startswith("VLLM_") and name not in envs.environment_variables
    ]
    for name in environment:
        os.environ.pop(name, None)
    os.environ.update(
        {name: value for name, value in environment.items() if name.startswith("VLLM_")}
    )
    try:
        current_platform.validate_environ(hard_fail=True)
    except ValueError as error:
        return {"error": str(error)}
    finally:
        for name in environment:
            os.environ.pop(name, None)
    if parsed.tool_call_parser:
        ToolParserManager.get_tool_parser(parsed.tool_call_parser)
    if engine.reasoning_parser:
        ReasoningParserManager.get_reasoning_parser(engine.reasoning_parser)
    return {
        "unknown": unknown,
        "attention": parsed.attention_backend or "",
        "context": engine.max_model_len,
        "kv_cache_bytes": engine.kv_cache_memory_bytes,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "speculative": engine.speculative_config,
        "linear": engine.linear_backend,
        "moe": engine.moe_backend,
    }


lines = json.loads(Path(sys.argv[1]).read_text())
answers = {name: parse(line["args"], line["environment"]) for name, line in lines.items()}
Path(sys.argv[2]).write_text(json.dumps(answers))
