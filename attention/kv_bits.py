"""What `kv_bits` of a call means. Needs no torch, so that command lines can be read without."""

from __future__ import annotations

import re
from dataclasses import dataclass

from attention.agreement import refuse

DYNAMIC = "dynamic"
MEAN = 4.0  # of "dynamic"
LOW, HIGH = 2, 8
GROUPS = (32, 16, 8)  # channels that share a scale: as many as divide a head without rest
SCALE_BITS = 8


def group_of(head_dim: int) -> int:
    """Channels of a group."""
    return next((size for size in GROUPS if head_dim % size == 0), GROUPS[-1])


def padded(head_dim: int) -> int:
    """Channels of a head that travel: whole groups."""
    return head_dim + -head_dim % group_of(head_dim)


@dataclass(frozen=True)
class Bits:
    """What a caller wants: `mean` bits for each element of keys and values, beside the scales; dynamic: in the mean."""

    mean: float
    dynamic: bool

    @classmethod
    def of(cls, kv_bits: object) -> Bits | None:
        """From `kv_bits` of a call. ArgumentError for anything else."""
        if kv_bits is None:
            return None
        if isinstance(kv_bits, int) and not isinstance(kv_bits, bool) and LOW <= kv_bits <= HIGH:
            return cls(float(kv_bits), dynamic=False)
        if isinstance(kv_bits, str) and (found := re.fullmatch(rf"{DYNAMIC}(?::(\d+(?:\.\d+)?))?", kv_bits)):
            mean = float(found[1] or MEAN)
            if LOW <= mean <= HIGH:
                return cls(mean, dynamic=True)
        rule = f"be None, an integer from {LOW} to {HIGH}, '{DYNAMIC}' or '{DYNAMIC}:MEAN' with a mean between them"
        raise refuse("kv_bits", rule, repr(kv_bits))

    def on_wire(self, head_dim: int) -> float:
        """Bits of an element, scales included, at most."""
        return (self.mean + SCALE_BITS / group_of(head_dim)) * padded(head_dim) / head_dim
