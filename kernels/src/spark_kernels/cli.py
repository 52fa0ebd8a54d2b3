"""The ``spark-kernels`` command: finds a subcommand's module only when it is asked for."""

import importlib
import sys
from collections.abc import Sequence

# name -> (module with ``main(argv) -> exit status``, one line of help)
COMMANDS = {
    "build": ("spark_kernels.build", "compile the CUDA sources into the package"),
    "policy": ("spark_kernels.policy", "print which kernel serves which layer, and why"),
    "tune": ("spark_kernels.tune", "measure launch parameters on this device and write them"),
}


def usage() -> str:
    """Return the help text: one line a subcommand."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: spark-kernels COMMAND [options]\n\n" + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns its exit status; 2 for an unknown command."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] in {"-h", "--help"}:
        sys.stdout.write(usage())
        return 0
    if not args or args[0] not in COMMANDS:
        named = f"no such command: {args[0]}\n" if args else ""
        sys.stderr.write(named + usage())
        return 2
    status: int = importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])
    return status
