"""dynasty stands on tasp_coll's public names, and loads torch only when a name is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

import dynasty
from package_rooms import check_light, check_order, imports

PACKAGE = Path(dynasty.__file__).parent
# Rooms in the order in which data flows; a module imports from those before it.
ORDER = (
    *("tiles", "integers", "packing"),
    *("widths", "vectors", "feedback", "collectives"),
    *("chip", "config", "operands", "layers", "sensitivity", "maps", "cost", "layout", "controller", "conversion"),
)
ELSEWHERE = {"attention.agreement"}  # how ranks agree, which stands on tasp_coll alone


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__"}


@pytest.mark.parametrize("module", ORDER)
def test_data_flows_one_way(module: str) -> None:
    check_order(PACKAGE, module, ORDER)
    for name in imports(PACKAGE / f"{module}.py"):
        room = name.partition(".")[0]
        if room == "attention":
            assert any(name.startswith(allowed) for allowed in ELSEWHERE), f"{module} imports {name}"


def test_importing_dynasty_is_light() -> None:
    check_light("dynasty")


def test_public_names() -> None:
    assert dynasty.__all__ == sorted(dynasty.__all__)
    assert {*dynasty.__all__} == {
        *("Block", "Feedback", "Quantized", "Sent", "all_gather", "all_reduce"),
        *("pack", "packed_bytes", "quantize", "unpack"),
        *("Chip", "Config", "Controller", "Cost", "convert"),
    }
    for name in dynasty.__all__:
        assert getattr(dynasty, name).__doc__, name
