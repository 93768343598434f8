"""DYNASTY: training at few bits, chosen block by block, and collectives that carry only the bits that matter.

After arXiv 2210.17047, of which no code is public. Stands on tasp_coll's public names; needs torch, which is loaded
when a name is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Block": "tiles",
    "Chip": "chip",
    "Config": "config",
    "Controller": "controller",
    "Cost": "cost",
    "Feedback": "feedback",
    "Quantized": "integers",
    "Sent": "collectives",
    "all_gather": "collectives",
    "all_reduce": "collectives",
    "convert": "conversion",
    "pack": "packing",
    "packed_bytes": "packing",
    "quantize": "integers",
    "unpack": "packing",
}

__all__ = [
    "Block",
    "Chip",
    "Config",
    "Controller",
    "Cost",
    "Feedback",
    "Quantized",
    "Sent",
    "all_gather",
    "all_reduce",
    "convert",
    "pack",
    "packed_bytes",
    "quantize",
    "unpack",
]

if TYPE_CHECKING:
    from dynasty.chip import Chip
    from dynasty.collectives import Sent, all_gather, all_reduce
    from dynasty.config import Config
    from dynasty.controller import Controller
    from dynasty.conversion import convert
    from dynasty.cost import Cost
    from dynasty.feedback import Feedback
    from dynasty.integers import Quantized, quantize
    from dynasty.packing import pack, packed_bytes, unpack
    from dynasty.tiles import Block


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__]
