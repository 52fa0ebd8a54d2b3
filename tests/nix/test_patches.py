"""The patch series of vllm-gb10: it meets the pinned wheels, and each patch changes what it says.

Needs the embedded engine (`make engine`): its Python has torch and vLLM's dependencies. Every
question is put to the tree as shipped as well, so a patch that stops mattering is seen, too.
"""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx2
import patches_wheel as wheels
import pytest
from spark_llm.demo_model import write_demo_model

ENGINE_PYTHON = wheels.REPO / ".venv-engine/bin/python"
SEED_TABLE = wheels.REPO / "docs/explanation/seed-patches.md"
GB10_BYTES = 128_524_550_144
SMALL_TIER, LARGE_TIER = [2048, 256], [8192, 1024]

# Question (patches_probe.py) -> the patch it is about, vLLM's answer as shipped, and with the series.
ANSWERS: dict[str, tuple[str, Any, Any]] = {
    "memory: NVML silent": ("0001", "NVMLError_NotSupported", GB10_BYTES),
    "memory: NVML answers": ("0001", GB10_BYTES, GB10_BYTES),
    "startup plan: NVML silent": ("0001", "NVMLError_NotSupported", 16),
    "defaults: NVML silent": ("0001", SMALL_TIER, SMALL_TIER),
    "defaults: NVML answers": ("0001", LARGE_TIER, SMALL_TIER),
    "defaults: H100": ("0001", LARGE_TIER, LARGE_TIER),
    "int8": ("0002", "CutlassInt8ScaledMMLinearKernel", "TritonInt8ScaledMMLinearKernel"),
    "int8 asymmetric": (
        "0002",
        "CutlassInt8ScaledMMLinearKernel",
        "TritonInt8ScaledMMLinearKernel",
    ),
    "int8: H100": ("0002", "CutlassInt8ScaledMMLinearKernel", "CutlassInt8ScaledMMLinearKernel"),
    "moe: qwen3_5": ("0003", "DEEPGEMM", "TRITON"),
    "moe: another model": ("0003", "DEEPGEMM", "DEEPGEMM"),
    "moe: qwen3_5, asked for": ("0003", "DEEPGEMM", "DEEPGEMM"),
    "modelopt: exclude_modules": ("0004", [], ["mtp*"]),
    "modelopt: ignore": ("0004", ["lm_head"], ["lm_head"]),
    "modelopt: both": ("0004", ["lm_head"], ["lm_head"]),
    "drain: late refusal": ("0005", "abort", "error"),
    "drain: its status": ("0005", 200, 503),
}


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not ENGINE_PYTHON.exists():
        pytest.fail("no embedded engine: run `make engine` first")
    tree = tmp_path_factory.mktemp("stock")
    wheels.unpack(wheels.cpu_wheel(), tree)
    return tree


@pytest.fixture(scope="session")
def patched(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The patched tree and what patch(1) said."""
    tree = tmp_path_factory.mktemp("patched") / "site-packages"
    return tree, wheels.patched_copy(stock, tree)


@pytest.fixture(scope="session")
def answers(
    stock: Path, patched: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two trees answer on a GB10: as shipped, patched."""
    scratch = tmp_path_factory.mktemp("probe")
    return _ask(stock, scratch), _ask(patched[0], scratch)


def _environment(tree: Path, scratch: Path) -> dict[str, str]:
    """A bare environment in which ``import vllm`` finds ``tree``; nothing inherited steers vLLM."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return keep | {
        "PYTHONPATH": str(tree),
        "PROBE_TMP": str(scratch),
        "XDG_CACHE_HOME": str(scratch),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }


def _ask(tree: Path, scratch: Path) -> dict[str, Any]:
    probe = Path(__file__).with_name("patches_probe.py")
    run = subprocess.run(
        [ENGINE_PYTHON, probe],
        env=_environment(tree, scratch),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    answers: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert answers.pop("tree") == str(tree), "another vLLM was imported than the one under test"
    assert answers.keys() == ANSWERS.keys()
    return answers


@pytest.mark.parametrize("file", wheels.SERIES, ids=lambda file: file.stem)
def test_header_says_why_and_until_when(file: Path) -> None:
    """Each patch says what it is for, where upstream stands, which seed item it settles and when it goes."""
    fields = wheels.headers(file)
    assert {"Description", "Origin", "Bug", "Seed", "Drop-When"} <= fields.keys()
    assert all(fields.values())
    assert fields["Bug"].startswith("https://github.com/vllm-project/vllm/")


def test_series_applies_exactly(patched: tuple[Path, str]) -> None:
    """The series applies in order with every hunk at its very line: no fuzz, no offset, nothing left over."""
    tree, said = patched
    assert "offset" not in said
    assert "fuzz" not in said
    assert said.count("patching file") == sum(len(wheels.touched_by(f)) for f in wheels.SERIES)
    assert not [*tree.rglob("*.rej"), *tree.rglob("*.orig")]


def test_touched_files_are_the_recorded_ones() -> None:
    """The recorded hashes name the very files that the series touches in the CPU wheel."""
    touched = {path for file in wheels.SERIES for path in wheels.touched_by(file)}
    shipped = wheels.recorded(wheels.cpu_wheel())
    assert json.loads(wheels.TOUCHED.read_text()) == {path: shipped[path] for path in touched}


@pytest.mark.parametrize("system", ["aarch64-linux", "x86_64-linux"])
def test_cuda_wheels_ship_the_same_bytes(system: str) -> None:
    """The CUDA wheel of a system has byte for byte the touched files that the CPU wheel has."""
    wheel = wheels.cuda_wheel(system)
    if wheel is None:
        pytest.skip(f"vLLM's CUDA wheel for {system} (320 MB) is not in {wheels.cache_folder()}")
    shipped = wheels.recorded(wheel)
    expected = json.loads(wheels.TOUCHED.read_text())
    assert {path: shipped[path] for path in expected} == expected


@pytest.mark.parametrize("question", ANSWERS)
def test_behaviour(question: str, answers: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """On a faked GB10 vLLM as shipped answers what we say is wrong, and patched vLLM answers right."""
    _, shipped, mended = ANSWERS[question]
    assert (answers[0][question], answers[1][question]) == (shipped, mended)


def test_every_patch_changes_an_answer() -> None:
    """Every patch of the series is shown to change something."""
    changing = {number for number, shipped, mended in ANSWERS.values() if shipped != mended}
    assert changing == {file.name[:4] for file in wheels.SERIES}


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("model") / "demo"
    write_demo_model(model)
    return model


class Server:
    """A real vLLM API server of one tree on a Unix socket, with its log as the source of events."""

    def __init__(self, tree: Path, model: Path, scratch: Path) -> None:
        self.socket = scratch / "vllm.sock"
        command: list[str | Path] = [ENGINE_PYTHON, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", model, "--served-model-name", "demo", "--uds", self.socket]
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
        command += ["--max-num-seqs", "4", "--shutdown-timeout", "60"]
        self.process = subprocess.Popen(
            command,
            env=_environment(tree, scratch) | {"VLLM_LOGGING_COLOR": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.log: IO[str] = self.process.stdout

    def wait_for(self, line: str) -> None:
        """Read the log up to a line that contains ``line``."""
        seen = []
        for said in self.log:
            if line in said:
                return
            seen.append(said)
        pytest.fail(f"vLLM ended before it said {line!r}:\n{''.join(seen[-30:])}")

    def client(self) -> httpx2.Client:
        transport = httpx2.HTTPTransport(uds=str(self.socket))
        return httpx2.Client(transport=transport, base_url="http://vllm", timeout=60)

    def stop(self) -> None:
        """End the server and whatever it started: they share a process group of their own."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


@pytest.fixture
def server(patched: tuple[Path, str], demo_model: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(patched[0], demo_model, tmp_path)
    try:
        server.wait_for("Application startup complete")
        yield server
    finally:
        server.stop()


def test_requests_during_drain(server: Server) -> None:
    """A draining server answers every new request and /health with 503 and completes the running one."""
    completion = {
        "model": "demo",
        "prompt": "the light of the river and the stone",
        "max_tokens": 8,
    }
    chat = {"model": "demo", "messages": [{"role": "user", "content": "the light of the river"}]}
    late: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", completion),
        ("/v1/completions", completion | {"prompt": list(range(20, 30))}),
        ("/v1/completions", completion | {"prompt": list(range(20, 30)), "stream": True}),
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"model": "demo", "input": "the light of the river"}),
        ("/v1/messages", chat | {"max_tokens": 8}),
    ]
    running = completion | {"max_tokens": 4000, "ignore_eos": True, "stream": True}
    with server.client() as first, first.stream("POST", "/v1/completions", json=running) as stream:
        chunks = stream.iter_lines()
        assert next(chunks).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining in-flight requests")
        with server.client() as second:
            health = second.get("/health").status_code
            answers = [second.post(path, json=body) for path, body in late]
        rest = [json.loads(line[6:]) for line in chunks if line.startswith("data: {")]
    assert (health, [a.status_code for a in answers]) == (503, [503] * len(late))
    assert all("shutting down" in a.json()["error"]["message"] for a in answers)
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(timeout=60) == 0


def _rows() -> dict[str, list[str]]:
    """Item -> the other cells of its row in the table of the seeds."""
    rows: dict[str, list[str]] = {}
    for line in SEED_TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `"):
            for item in re.findall(r"`([^`]+)`", cells[0]):
                assert item not in rows, f"{item} has two rows"
                rows[item] = cells[1:]
    return rows


def test_every_seed_item_has_its_row() -> None:
    """Each item of the seeds, and each of our patches, has exactly one row; no row is about anything else."""
    listed = Path(__file__).with_name("seed_items.txt").read_text().splitlines()
    items = [line for line in listed if line and not line.startswith("#")]
    assert len(items) == len(set(items))
    assert _rows().keys() == {*items, *(file.stem for file in wheels.SERIES)}
    assert all(all(cells) for cells in _rows().values())


def test_seed_table_points_at_what_exists() -> None:
    """Every file that the table gives as proof is in the pinned wheel or in this repository."""
    shipped = wheels.recorded(wheels.cpu_wheel())
    paths = re.findall(
        r"`((?:vllm|appliance|kernels|nix|pkgs|tests)/[^`…]+)`", SEED_TABLE.read_text()
    )
    missing = {path for path in paths if path not in shipped and not (wheels.REPO / path).exists()}
    assert not missing
