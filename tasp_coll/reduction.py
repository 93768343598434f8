"""The arithmetic of reductions: the one place that knows what elements mean.

Contributions come in the caller's dtype; partial results travel and are accumulated in a wire dtype, which is
float32 for bfloat16 and float16 (whose few bits of mantissa would be rounded at every hop), else the dtype
itself. All memory is given by address, counts are in elements. A `Memory` says whose addresses they are: NumPy's
functions serve CuPy's arrays too.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .errors import ArgumentError

OPS = ("sum", "prod", "min", "max", "avg")
_UFUNCS = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum, "avg": np.add}
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_HALVES = ("bfloat16", "float16")
_COMPLEX = ("complex64", "complex128")
DTYPES = ("bool", *_INTEGERS, *_HALVES, "float32", "float64", *_COMPLEX)
_FLOAT32, _UINT32 = np.dtype(np.float32), np.dtype(np.uint32)

# One array type for every address and length: from_address touches no memory, frombuffer's count bounds it.
_Bytes = ctypes.c_char * sys.maxsize
_NDArray = np.ndarray[Any, Any]


class Memory(Protocol):
    """Where addresses point."""

    block: int  # elements that are widened at a time

    def array(self, address: int, dtype: np.dtype[Any], count: int) -> _NDArray:
        """(count,) at an address, without a copy."""

    def empty(self, count: int, dtype: np.dtype[Any]) -> _NDArray:
        """(count,) of fresh memory."""

    def move(self, dst: int, src: int, nbytes: int) -> None:
        """Copy bytes."""

    def clear(self, dst: int, nbytes: int) -> None:
        """Set bytes to zero."""


class HostMemory:
    """This process's."""

    block = 1 << 16  # the temporaries stay in the second-level cache

    def array(self, address: int, dtype: np.dtype[Any], count: int) -> _NDArray:
        memory: Any = _Bytes.from_address(address)
        array: _NDArray = np.frombuffer(memory, dtype, count)
        return array

    def empty(self, count: int, dtype: np.dtype[Any]) -> _NDArray:
        return np.empty(count, dtype)

    def move(self, dst: int, src: int, nbytes: int) -> None:
        ctypes.memmove(dst, src, nbytes)

    def clear(self, dst: int, nbytes: int) -> None:
        ctypes.memset(dst, 0, nbytes)


HOST = HostMemory()


def _blocks(length: int, *arrays: _NDArray) -> Iterator[tuple[_NDArray, ...]]:
    for start in range(0, len(arrays[0]), length):
        yield tuple(array[start : start + length] for array in arrays)


def _widen(wide: _NDArray, stored: _NDArray) -> None:
    """float32 from float16, or from the bits of bfloat16, which are the upper half of float32's."""
    if stored.dtype == np.uint16:
        bits = wide.view(_UINT32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(wide, stored)


def _narrow(stored: _NDArray, wide: _NDArray) -> None:
    """Round to nearest, ties to even (IEEE 754). NaN stays NaN, made quiet; infinity stays infinity."""
    if stored.dtype != np.uint16:
        np.copyto(stored, wide, casting="same_kind")
        return
    bits = wide.view(_UINT32)
    rounded = bits >> np.uint32(16)
    quiet = rounded | np.uint32(0x40)
    rounded &= np.uint32(1)  # the last bit that stays decides ties
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    np.copyto(rounded, quiet, where=np.isnan(wide))
    np.copyto(stored, rounded, casting="unsafe")


@dataclass(frozen=True)
class Reduction:
    """One operation on one dtype over `ranks` ranks; `reduction` makes it.

    Integers wrap as in NumPy, NaN wins in min and max, and for bool sum and max are "or", prod and min are
    "and". Floating-point overflow gives infinity, silently.
    """

    op: str
    dtype: str
    ranks: int

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ArgumentError(f"op must be one of {', '.join(OPS)}; got {self.op!r}")
        if self.dtype not in DTYPES:
            raise ArgumentError(f"dtype must be reducible, one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.ranks < 1:
            raise ArgumentError(f"ranks must be at least 1; got {self.ranks}")
        if self.op == "avg" and self.dtype in ("bool", *_INTEGERS):
            raise ArgumentError(
                "op 'avg' needs floating-point or complex elements: take 'sum' and divide as you need; "
                f"got dtype {self.dtype!r}"
            )
        if self.op in ("min", "max") and self.dtype in _COMPLEX:
            raise ArgumentError(f"op {self.op!r} needs elements with an order; got dtype {self.dtype!r}")

    @functools.cached_property
    def _stored(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.dtype == "bfloat16" else self.dtype)

    @functools.cached_property
    def _wire(self) -> np.dtype[Any]:
        return _FLOAT32 if self.dtype in _HALVES else self._stored

    @functools.cached_property
    def itemsize(self) -> int:
        return self._stored.itemsize

    @functools.cached_property
    def wire_dtype(self) -> str:
        """Canonical name of the dtype of partial results."""
        return self._wire.name

    @functools.cached_property
    def wire_itemsize(self) -> int:
        return self._wire.itemsize

    def copy(self, dst: int, src: int, count: int, memory: Memory = HOST) -> None:
        """`count` elements at `src` -> `dst`, both of the dtype: the sum over one rank."""
        memory.move(dst, src, count * self.itemsize)

    def widen(self, dst: int, src: int, count: int, memory: Memory = HOST) -> None:
        """`count` elements at `src` (dtype) -> `dst` (wire dtype). dst == src is allowed if these are one."""
        if self._wire is self._stored:
            memory.move(dst, src, count * self.itemsize)
        elif count:
            arrays = memory.array(dst, self._wire, count), memory.array(src, self._stored, count)
            for wide, stored in _blocks(memory.block, *arrays):
                _widen(wide, stored)

    def combine(self, acc: int, contribution: int, count: int, memory: Memory = HOST) -> None:
        """acc (wire dtype) op= contribution (dtype), `count` elements each."""
        if self._wire is self._stored:
            self.merge(acc, contribution, count, memory)
        elif count:
            scratch = memory.empty(min(count, memory.block), self._wire)
            arrays = memory.array(acc, self._wire, count), memory.array(contribution, self._stored, count)
            for wide, stored in _blocks(memory.block, *arrays):
                _widen(scratch[: len(stored)], stored)
                self._accumulate(wide, scratch[: len(stored)])

    def merge(self, acc: int, partial: int, count: int, memory: Memory = HOST) -> None:
        """acc op= partial, `count` elements of the wire dtype each."""
        if count:
            self._accumulate(memory.array(acc, self._wire, count), memory.array(partial, self._wire, count))

    def finish(self, dst: int, acc: int, count: int, memory: Memory = HOST) -> None:
        """`count` results at `acc` (wire dtype) -> `dst` (dtype): divided by `ranks` for "avg", then rounded
        to nearest, ties to even. `acc` is left as it was; dst == acc is allowed if the dtypes are one."""
        if not count:
            return
        divide = self.op == "avg" and self.ranks > 1
        if self._wire is self._stored and not divide:
            memory.move(dst, acc, count * self.itemsize)
            return
        stored, wide = memory.array(dst, self._stored, count), memory.array(acc, self._wire, count)
        with np.errstate(all="ignore"):
            if self._wire is self._stored:
                np.divide(wide, self._wire.type(self.ranks), out=stored)
                return
            for narrow, block in _blocks(memory.block, stored, wide):
                _narrow(narrow, block / self._wire.type(self.ranks) if divide else block)

    def _accumulate(self, acc: _NDArray, more: _NDArray) -> None:
        with np.errstate(all="ignore"):
            _UFUNCS[self.op](acc, more, out=acc)


_cached = functools.lru_cache(maxsize=256)(Reduction)


def reduction(op: str, dtype: str, ranks: int) -> Reduction:
    """The Reduction of `op` ("sum", "prod", "min", "max", "avg") on elements of canonical name `dtype` over
    `ranks` ranks. Equal arguments give the same object.

    ArgumentError: an unknown op, a dtype without arithmetic here (fp8, dates, text, structures, foreign byte
    order), "avg" of integers or bool, "min" and "max" of complex numbers.
    """
    if not isinstance(op, str):  # it may not even be hashable
        raise ArgumentError(f"op must be one of {', '.join(OPS)}; got {op!r}")
    return _cached(op, dtype, ranks)
