"""What packages that stand on tasp_coll may import: read from their sources, so that nothing has to be loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tasp_coll

HEAVY = ("mpi4py", "transformers", "matplotlib", "cupy", "torch", "numpy")


def imports(module: Path) -> set[str]:
    """All names that it imports, those inside functions too."""
    tree = ast.parse(module.read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def check_order(package: Path, module: str, order: Sequence[str]) -> None:
    """A module imports from those before it, and public names of tasp_coll."""
    for name in imports(package / f"{module}.py"):
        room, _, rest = name.partition(".")
        if room == package.name and rest and rest.split(".")[0] in order:
            assert order.index(rest.split(".")[0]) < order.index(module), f"{module} imports {name}"
        if room == "tasp_coll" and rest:
            assert rest in tasp_coll.__all__, f"{module} imports {name}, which is not public"


def check_light(module: str) -> None:
    """Importing it loads nothing heavy."""
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "[]"
