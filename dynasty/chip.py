"""The accelerator that costs are modelled for."""

from __future__ import annotations

from dataclasses import dataclass

from tasp_coll import ArgumentError


@dataclass(frozen=True)
class Chip:
    """side: of its array of side x side multiply-accumulators. buffer_bytes: on the chip; what does not fit into it
    goes to DRAM, all with 0. The defaults are a small edge accelerator's.
    """

    side: int = 32
    buffer_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        for name, value, lowest in (("side", self.side, 1), ("buffer_bytes", self.buffer_bytes, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ArgumentError(f"{name} of a chip must be an integer >= {lowest}, got {value!r}")
