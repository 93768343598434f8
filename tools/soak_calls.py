"""Random collectives: each is drawn from the seed and its number alone, so that any of them can be repeated by itself.

What each rank sends is drawn as well, so that every rank knows every element that it must get.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import perf_data
from perf_data import Dtype, NDArray

GATHERS = ("allgather", "allgatherv")
REDUCTIONS = ("reduce_scatter", "allreduce")
STREAMS = ("allgather_steps", "reduce_scatter_steps")
KINDS = (*GATHERS, *REDUCTIONS, "all_to_all", *STREAMS)
FORMS = ("plain", "into", "in place", "async", "again", "wrong")
STREAM_FORMS = ("whole", "early", "beside", "wrong")
_NUMPY = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "half", "float", "double")
_FLOATS = ("half", "bfloat16", "float", "double")
_LARGEST = 1 << 21  # bytes of a shard


@dataclass(frozen=True)
class Call:
    """One collective, the same on all ranks; communicators of fewer ranks take the first `rows`."""

    number: int
    kind: str
    place: float  # of the communicator among those that are open, 0 to 1
    rows: tuple[int, ...]  # of each rank's shard, where they may differ
    rest: tuple[int, ...]
    dtype: str
    array: str  # "numpy", "torch", "strided"
    algorithm: str
    rings: int | None
    op: str
    form: str
    flag: bool  # of streams: reverse, or accumulate; of a reduce-scatter: counts
    donate: bool

    def __str__(self) -> str:
        rings = "" if self.rings is None else f", rings={self.rings}"
        shape = f"rows {self.rows} of {self.rest}"
        op = f", {self.op}" if self.kind in REDUCTIONS else ""
        flags = ("flag" if self.flag else "") + (" donate" if self.donate else "")
        return f"{self.kind} ({self.form} {flags}), {shape}, {self.dtype} ({self.array}), {self.algorithm}{rings}{op}"

    @property
    def values(self) -> Dtype:
        """The element type."""
        return perf_data.dtype(self.dtype)


def draw(seed: int, number: int, ranks: int, with_torch: bool, with_native: bool = True) -> Call:
    """Call `number`. with_torch: its arrays too; with_native: the MPI library's collectives too."""
    rng = random.Random(f"{seed}/{number}")
    kind = rng.choice(KINDS)
    dtype = rng.choice((*_NUMPY, "bfloat16") if with_torch else _NUMPY)
    op = rng.choice(("sum", "prod", "min", "max", "avg") if dtype in _FLOATS else ("sum", "prod", "min", "max"))
    rest = tuple(rng.choice((1, 1, 2, 3, 8)) for _ in range(rng.choice((0, 0, 1, 1, 2))))
    # Sizes are spread evenly over their logarithms; a shard without rows, or a row without elements, is one too.
    row_bytes = perf_data.dtype(dtype).itemsize * int(np.prod(rest, dtype=int))
    most = max(1, int(2 ** rng.uniform(0, np.log2(_LARGEST) if rng.random() < 0.1 else 15)) // row_bytes)
    rows = tuple(rng.choice((0, most, most, rng.randint(0, most))) for _ in range(ranks))
    if rng.random() < 0.02:
        rest = (*rest, 0)
    algorithm, rings = _algorithm(rng, kind, dtype, op)
    forms, weights = (STREAM_FORMS, (4, 1, 2, 0.2)) if kind in STREAMS else (FORMS, (4, 3, 3, 2, 2, 0.3))
    if algorithm == "native" and not with_native:
        algorithm = "auto"
    form = rng.choices(forms, weights)[0]
    if kind == "all_to_all" and form == "in place":
        form = "into"
    arrays = ["numpy", "numpy", "strided"] + ["torch"] * (2 * with_torch)
    array = "torch" if dtype == "bfloat16" else rng.choice(arrays)
    flag, donate = rng.random() < 0.4, kind == "allgather_steps" and array != "strided" and rng.random() < 0.3
    if kind == "reduce_scatter_steps" and flag and algorithm == "direct":
        algorithm = "auto"
    if array == "torch" and flag and dtype in ("uint16", "uint32", "uint64"):
        array = "numpy"  # torch cannot add them
    if array == "strided" and (form == "in place" or kind == "reduce_scatter_steps"):
        array = "numpy"
    return Call(number, kind, rng.random(), rows, rest, dtype, array, algorithm, rings, op, form, flag, donate)


def _algorithm(rng: random.Random, kind: str, dtype: str, op: str) -> tuple[str, int | None]:
    if kind == "all_to_all":
        return "auto", None
    names = ["auto", "auto", "rings", "ring", "direct"]
    if kind in GATHERS or (kind in REDUCTIONS and op != "avg" and dtype not in ("half", "bfloat16", "int8", "uint8")):
        names.append("native")
    name = rng.choice(names)
    return name, 1 if name == "rings" and rng.random() < 0.3 else None


class Numbers:
    """What the ranks of one communicator send in one call, and what comes of it. Arrays are bits, 1-d.

    colour: tells communicators apart that make the same call at the same time. salt: calls of one draw.
    """

    def __init__(self, seed: int, call: Call, ranks: int, colour: int, salt: int = 0) -> None:
        self._key, self._call, self.ranks = (seed, call.number, colour, salt), call, ranks
        self.row = int(np.prod(call.rest, dtype=int))
        self.rows = call.rows[:ranks] if _uneven(call) else call.rows[:1] * ranks
        self.starts = tuple(np.concatenate([[0], np.cumsum(self.rows)]).tolist())

    def sent_rows(self, rank: int) -> int:
        """Of a gather: those of the rank's shard. Of the others: as many as all shards have, of an allreduce as one."""
        if self._call.kind in (*GATHERS, "allgather_steps"):
            return self.rows[rank]
        return self.rows[0] if self._call.kind == "allreduce" else self.starts[-1]

    def result_rows(self, rank: int) -> int:
        """Rows of what the rank gets."""
        if self._call.kind in ("reduce_scatter", "reduce_scatter_steps"):
            return self.rows[rank]
        return self.rows[0] if self._call.kind == "allreduce" else self.starts[-1]

    def sent(self, rank: int) -> NDArray:
        """What the rank sends."""
        count = self.sent_rows(rank) * self.row
        if self._call.kind in (*REDUCTIONS, "reduce_scatter_steps"):
            return self._call.values.encode(self._whole_numbers(rank, count))
        return self._bits(rank, count)

    def gathered(self) -> NDArray:
        """All shards, rank-major."""
        return np.concatenate([self.sent(rank) for rank in range(self.ranks)])

    def expected(self, rank: int) -> NDArray:
        """What the rank must get."""
        if self._call.kind in GATHERS:
            return self.gathered()
        if self._call.kind == "all_to_all":
            return self.exchanged(rank)
        return self.reduced() if self._call.kind == "allreduce" else self.reduced()[self.part(rank)]

    def exchanged(self, rank: int) -> NDArray:
        """Of an all-to-all: the blocks for this rank."""
        mine = self.part(rank)
        return np.concatenate([self.sent(other)[mine] for other in range(self.ranks)])

    def reduced(self) -> NDArray:
        """The sum, or what the operation makes of it, of everything that was sent."""
        call = self._call
        every = np.stack([self._whole_numbers(rank, self.sent_rows(rank) * self.row) for rank in range(self.ranks)])
        op = "sum" if call.kind in STREAMS else call.op
        total: NDArray = getattr(every, "sum" if op == "avg" else op)(0)
        return call.values.encode(total // np.uint64(self.ranks) if op == "avg" else total)

    def part(self, rank: int) -> slice:
        """The elements of a rank's shard in what all have."""
        return slice(self.starts[rank] * self.row, self.starts[rank + 1] * self.row)

    def _bits(self, rank: int, count: int) -> NDArray:
        dtype = self._call.values
        raw = np.random.default_rng((*self._key, rank)).bytes(count * dtype.itemsize)
        return np.frombuffer(bytearray(raw), dtype.bits)

    def _whole_numbers(self, rank: int, count: int) -> NDArray:
        """Small enough for any dtype: results are exact, whatever the order."""
        scale = np.uint64(self.ranks if self._call.op == "avg" and self._call.kind not in STREAMS else 1)
        found = np.random.default_rng((*self._key, rank)).integers(1, 3, count, np.uint64)
        return found * scale


def _uneven(call: Call) -> bool:
    return call.kind in ("allgatherv", *STREAMS) or (call.kind == "reduce_scatter" and call.flag)


def array_of(call: Call, bits: NDArray, shape: Sequence[int]) -> Any:
    """The caller's array with these bits."""
    dtype = call.values
    if call.array == "torch":
        return dtype.tensor(bits).reshape(*shape)
    array = dtype.face(bits).reshape(shape)
    if call.array != "strided":
        return array
    spread = np.zeros((*shape, 2), array.dtype)
    spread[..., 0] = array
    return spread[..., 0]


def bits_of(call: Call, array: Any) -> NDArray:
    """The bits of a caller's array, 1-d."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).reshape(-1).view(call.values.bits)
    import torch

    flat: NDArray = array.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(call.values.bits)


def spoilt(call: Call, count: int) -> NDArray:
    """Memory for a result, with nothing that could be taken for one."""
    return np.full(count, 0xA5, call.values.bits)


def contiguous(call: Call) -> Call:
    """The same call for arrays that must be contiguous."""
    return replace(call, array="numpy") if call.array == "strided" else call
