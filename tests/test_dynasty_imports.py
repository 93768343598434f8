"""dynasty stands on tasp_coll's public names, and loads torch only when a name is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dynasty
import tasp_coll

PACKAGE = Path(dynasty.__file__).parent
# Rooms in the order in which data flows; a module imports from those before it.
ORDER = (
    *("tiles", "integers", "packing"),
    *("widths", "vectors", "feedback", "collectives"),
    *("chip", "config", "operands", "layers", "sensitivity", "maps", "cost", "layout", "controller", "conversion"),
)
ELSEWHERE = {"attention.agreement"}  # how ranks agree, which stands on tasp_coll alone


def imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__"}


@pytest.mark.parametrize("module", ORDER)
def test_data_flows_one_way(module: str) -> None:
    for name in imports(module):
        room, _, rest = name.partition(".")
        if room == "dynasty" and rest and rest.split(".")[0] in ORDER:
            assert ORDER.index(rest.split(".")[0]) < ORDER.index(module), f"{module} imports {name}"
        if room == "tasp_coll" and rest:
            assert rest in tasp_coll.__all__, f"{module} imports {name}, which is not public"
        if room == "attention":
            assert any(name.startswith(allowed) for allowed in ELSEWHERE), f"{module} imports {name}"


def test_importing_dynasty_is_light() -> None:
    heavy = ("mpi4py", "transformers", "matplotlib", "cupy", "torch", "numpy")
    code = f"import dynasty, sys; print([name for name in {heavy} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "[]"


def test_public_names() -> None:
    assert dynasty.__all__ == sorted(dynasty.__all__)
    assert {*dynasty.__all__} == {
        *("Block", "Feedback", "Quantized", "Sent", "all_gather", "all_reduce"),
        *("pack", "packed_bytes", "quantize", "unpack"),
        *("Chip", "Config", "Controller", "Cost", "convert"),
    }
    for name in dynasty.__all__:
        assert getattr(dynasty, name).__doc__, name
