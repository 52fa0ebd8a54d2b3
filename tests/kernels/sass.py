"""Reading machine code: disassemble a cubin and count the instructions of a loop.

nvdisasm comes from the triton wheel, so that no CUDA toolkit is needed beyond the compiler.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_SECTION = re.compile(r"\n\s*\.section\s+\.text\.(\S+?),")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")


def find_nvdisasm() -> str:
    """Return the path of nvdisasm: NVIDIA's wheel's, the triton wheel's, else PATH's.

    Raises:
        FileNotFoundError: there is none; the message says what to install.
    """
    try:
        wheel = metadata.distribution("nvidia-cuda-nvdisasm")
    except metadata.PackageNotFoundError:
        pass
    else:
        return str(wheel.locate_file("nvidia/cu13/bin/nvdisasm"))
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm"
        if bundled.is_file():
            return str(bundled)
    found = shutil.which("nvdisasm")
    if found is None:
        raise FileNotFoundError("needs nvdisasm: install the triton wheel or the CUDA toolkit's")
    return found


def opcode(instruction: str) -> str:
    """Return an instruction's opcode with its modifiers, without its predicate and operands."""
    return _PREDICATE.sub("", instruction).split()[0]


@dataclass(frozen=True)
class Function:
    """One kernel's machine code: ``lines`` in order, ``labels`` as indices into them."""

    name: str
    lines: tuple[str, ...]
    labels: dict[str, int]

    def count(self, pattern: str) -> int:
        """Return how many instructions have an opcode that begins with ``pattern`` (a regex)."""
        return sum(re.match(pattern, opcode(line)) is not None for line in self.lines)

    def loop(self, pattern: str) -> tuple[str, ...]:
        """Return the shortest loop body with an opcode that begins with ``pattern``.

        Raises:
            LookupError: no loop holds one.
        """
        bodies = []
        for end, line in enumerate(self.lines):
            target = _BRANCH.search(line)
            start = self.labels.get(target.group(1), end + 1) if target else end + 1
            body = self.lines[start : end + 1]
            if any(re.match(pattern, opcode(one)) for one in body):
                bodies.append(body)
        if not bodies:
            raise LookupError(f"no loop of {self.name} holds {pattern}")
        return min(bodies, key=len)


def opcodes(body: tuple[str, ...]) -> Counter[str]:
    """Count a loop body's instructions by opcode without modifiers."""
    return Counter(opcode(line).split(".")[0] for line in body)


def disassemble(cubin: Path) -> dict[str, Function]:
    """Return the kernels of a cubin by their (mangled) names."""
    text = subprocess.run(
        [find_nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    parts = _SECTION.split(text)
    functions = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        lines: list[str] = []
        labels: dict[str, int] = {}
        for line in body.split("\n"):
            if label := _LABEL.match(line):
                labels[label.group(1)] = len(lines)
            elif found := _INSTRUCTION.search(line):
                lines.append(found.group(1))
        functions[name] = Function(name, tuple(lines), labels)
    return functions
