"""attention stands on tasp_coll's public names and dynasty's integers, and loads nothing that a caller may not have."""

from __future__ import annotations

from pathlib import Path

import pytest

import attention
import dynasty
from package_rooms import check_light, check_order, imports

PACKAGE = Path(attention.__file__).parent
QUANTIZER = ("tiles", "integers", "packing")  # what attention may know of dynasty
# Rooms in the order in which data flows; a module imports from those before it. The last four need transformers or are
# for language models.
ORDER = (
    *(
        "forecast",
        "agreement",
        "kv_bits",
        "kernel_parts",
        "tracing",
        "dense",
        "partition",
        "blocks",
        "sequence",
        "check",
    ),
    *("kernels_host", "kernels_cuda", "kernels_flash_attn", "kernels"),
    *("merge_triton", "merge", "compute", "wire", "wire_bits", "kv_widths", "methods"),
    *("ulysses", "choice", "function", "kv_error", "training", "sharded_cache", "generation", "transformers"),
)


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__"}


@pytest.mark.parametrize("module", ORDER)
def test_data_flows_one_way(module: str) -> None:
    check_order(PACKAGE, module, ORDER)
    for name in imports(PACKAGE / f"{module}.py"):
        room, _, rest = name.partition(".")
        if room == "dynasty":
            assert rest.split(".")[0] in QUANTIZER, f"{module} imports {name}"


def test_dynasty_knows_nothing_of_attention_but_how_ranks_agree() -> None:
    for path in Path(dynasty.__file__).parent.glob("*.py"):
        found = {name for name in imports(path) if name.split(".")[0] == "attention"}
        assert all(name.startswith("attention.agreement") for name in found), f"{path.name} imports {found}"


def test_importing_attention_is_light() -> None:
    check_light("attention.forecast")


def test_public_names() -> None:
    assert sorted(attention.__all__) == [
        "KvError",
        "Work",
        "check_work",
        "context_parallel_attention",
        "kv_error",
        "record",
        "sequence_indices",
        "shard_sequence",
        "unshard_sequence",
    ]
