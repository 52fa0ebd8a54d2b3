"""Imports run one way: each package is used by what lies above it, and uses nothing of that."""

import ast
from pathlib import Path

import spark_llm

ROOT = Path(spark_llm.__file__).parent
ABOVE = {
    "store": {"spark_llm.gateway", "spark_llm.commands", "spark_llm.controller"},
    "gateway": {"spark_llm.commands", "spark_llm.service", "spark_llm.server"},
}
"""What a package may never import."""
USERS = {"gateway": {"service.py", "server.py", "reload.py"}, "commands": {"cli.py"}}
"""The only modules outside a package that may import it."""


def imported(module: Path) -> set[str]:
    """Names of all modules that ``module`` imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_packages_do_not_look_up() -> None:
    """The store knows no gateway, the gateway no service, and neither knows a command."""
    for package, above in ABOVE.items():
        for module in (ROOT / package).rglob("*.py"):
            bad = {name for name in imported(module) if any(within(name, item) for item in above)}
            assert not bad, module


def test_only_what_lies_above_uses_a_package() -> None:
    """What decides and runs does not depend on how clients are answered, or on the command line."""
    for package, users in USERS.items():
        for module in ROOT.rglob("*.py"):
            inside = (ROOT / package) in module.parents
            if inside or module.relative_to(ROOT).as_posix() in users:
                continue
            bad = {name for name in imported(module) if within(name, f"spark_llm.{package}")}
            assert not bad, module
