"""What ranks send, and what they must have received: every element is known from its rank, its index and a seed.

The pattern catches a chunk in the wrong place (the index is hashed), data of another rank and data that is left
from an earlier call (rank and seed are added to the hash, times odd numbers, so that neighbours always differ).
Memory is seen as unsigned integers of the element's width, so that NaNs and bfloat16 compare like anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

NDArray = np.ndarray[Any, Any]
Source = Callable[[int, int], NDArray]  # elements start..stop, as unsigned integers of the element's width
_BLOCK = 1 << 16  # elements looked at together: temporaries stay in the cache, memory is never doubled
_RANK, _SEED = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_INDEX, _AGAIN, _HALF = np.uint64(0x9FB21C651E98DF25), np.uint64(0xD6E8FEB86659FD93), np.uint64(32)


@dataclass(frozen=True)
class Dtype:
    """An element type: nccl-tests' name and NumPy's."""

    nccl: str
    name: str
    itemsize: int
    digits: int  # bits of integers that it holds exactly; 0 for integers, whose sums wrap

    @property
    def bits(self) -> np.dtype[Any]:
        """Unsigned integers of the same width."""
        return np.dtype(f"uint{8 * self.itemsize}")

    def face(self, memory: NDArray) -> Any:
        """The memory as an array of this type: NumPy's, or torch's for bfloat16, which NumPy lacks."""
        return self.tensor(memory) if self.name == "bfloat16" else memory.view(self.name)

    def tensor(self, memory: NDArray) -> Any:
        """The memory as a torch tensor of this type."""
        import torch

        return torch.from_numpy(memory.view(np.uint8)).view(getattr(torch, self.name))

    def encode(self, values: NDArray) -> NDArray:
        """The bits of these uint64 values in this type: of integers the low bits."""
        if not self.digits:
            return values.astype(self.bits)
        if self.name == "bfloat16":
            return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(self.bits)
        return values.astype(self.name).view(self.bits)


_INTEGERS = tuple(
    Dtype(name, name, np.dtype(name).itemsize, 0)
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
)
_FLOATS = (
    Dtype("half", "float16", 2, 11),
    Dtype("bfloat16", "bfloat16", 2, 8),
    Dtype("float", "float32", 4, 24),
    Dtype("double", "float64", 8, 53),
)
_KNOWN = {
    **{known.nccl: known for known in (*_INTEGERS, *_FLOATS)},
    "char": Dtype("char", "int8", 1, 0),
    **{known.name: known for known in _FLOATS},
}
NAMES = tuple(_KNOWN)


def dtype(name: str) -> Dtype:
    """The type that a user means: nccl-tests' name, or NumPy's."""
    return _KNOWN[name]


@dataclass(frozen=True)
class Pattern:
    """The elements that each rank sends for one seed.

    summed: they will be added up, over `ranks` ranks. Floating-point elements are then small integers, so that their
    sum is exact in any order; else all bits are used.
    """

    dtype: Dtype
    ranks: int
    seed: int
    summed: bool

    @property
    def width(self) -> int:
        """Bits of an element that vary."""
        if not (self.summed and self.dtype.digits):
            return 64
        return self.dtype.digits - (self.ranks - 1).bit_length()

    def sent(self, rank: int | NDArray, index: NDArray) -> NDArray:
        """What `rank` sends at `index`."""
        values = self._values(rank, _hash(index))
        return self.dtype.encode(values) if self.summed else values.astype(self.dtype.bits)

    def total(self, index: NDArray) -> NDArray:
        """The sum over all ranks of what they send at `index`."""
        hashed = _hash(index)
        values = self._values(0, hashed)
        for rank in range(1, self.ranks):
            values += self._values(rank, hashed)
        return self.dtype.encode(values)

    def _values(self, rank: int | NDArray, hashed: NDArray) -> NDArray:
        added = np.multiply(np.asarray(rank, np.uint64).reshape(-1), _RANK)
        added = added + np.multiply(np.array([self.seed], np.uint64), _SEED)
        return (hashed + added) & np.uint64((1 << self.width) - 1)


def fill(memory: NDArray, source: Source) -> None:
    """Write the elements of `source`."""
    for start, stop in _blocks(len(memory)):
        memory[start:stop] = source(start, stop)


def spoil(memory: NDArray, source: Source) -> None:
    """Write elements of which each differs from the one in `source`, so that one that is never written is seen."""
    for start, stop in _blocks(len(memory)):
        np.invert(source(start, stop), out=memory[start:stop])


def count_wrong(memory: NDArray, source: Source) -> int:
    """How many elements differ from those of `source`."""
    return sum(int(np.count_nonzero(memory[start:stop] != source(start, stop))) for start, stop in _blocks(len(memory)))


def indices(start: int, stop: int) -> NDArray:
    """start, start + 1, ... stop - 1, as `Pattern` wants them."""
    return np.arange(start, stop, dtype=np.uint64)


def _hash(index: NDArray) -> NDArray:
    mixed = index * _INDEX
    mixed ^= mixed >> _HALF
    mixed *= _AGAIN
    mixed ^= mixed >> _HALF
    return mixed


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, _BLOCK):
        yield start, min(start + _BLOCK, count)
