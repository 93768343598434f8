"""The collectives, each with what is particular to it.

That is its shapes, how small payloads that came with the agreement are put together, its programs, and what the
library's own call needs. What they share is in `operations.Collective`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasp_coll import arrays
from tasp_coll.agreement import NOT_INLINE, Header
from tasp_coll.arrays import Buffer, memory_at
from tasp_coll.core import Shape
from tasp_coll.errors import ArgumentError, MismatchError
from tasp_coll.executor import Program
from tasp_coll.forecast import Choice
from tasp_coll.operations import Collective, Steps
from tasp_coll.options import Call
from tasp_coll.programs import ALIGN, all_to_all_program, gather_program
from tasp_coll.reduce_programs import reduce_program
from tasp_coll.reduction import Reduction, reduction
from tasp_coll.schedule import Schedule, cut, uniform_weights
from tasp_coll.transport import NativeRequest

_LARGE = 4 << 20  # bytes from which on NumPy asks for large pages


class AllGather(Collective):
    """Shards of one shape, rank-major."""

    collective, name = "allgather", "decomposed_allgather"
    # By where a round has its payloads, of which there are few: `recv`'s address seen last, and views of both.
    _views: dict[int, tuple[int, NDArray[np.uint8], NDArray[np.uint8]]]

    def key(self) -> tuple[Any, ...]:
        return self.send.shape, self.send.dtype

    def prepare(self, recv: Any) -> None:
        rows, rest = Shape.of(self.send.shape)
        self.out = self.receive(recv, (self.core.size * rows, *rest), self.core.rank * self.send.nbytes)
        self._views = {}

    def sizes(self) -> tuple[int, ...]:
        return (self.send.nbytes,) * self.core.size

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        return (gather_program(schedule, self.core.rank, self.sizes()),)

    def bases(self) -> Sequence[dict[str, int]]:
        assert self.out is not None
        return ({"send": self.home() if self.own_first() else self.send.address, "recv": self.out.address},)

    def unpack(self) -> None:
        assert self.out is not None
        nbytes = self.send.nbytes
        if not nbytes:
            return
        place = self.core.rounds.payload(0)
        views = self._views.get(place)
        if views is None or views[0] != self.out.address:
            target = memory_at(self.out.address, self.core.size * nbytes).reshape(self.core.size, nbytes)
            views = self.out.address, target, self.core.rounds.payloads(nbytes)
            if self._small:  # as it is made again and again; else it may outlive the communicator
                self._views[place] = views
        _, target, source = views
        target[...] = source

    def own(self) -> list[tuple[int, int, int]]:
        place = self.home()
        return [(place, self.send.address, self.send.nbytes)] if place != self.send.address else []

    def own_first(self) -> bool:
        """Where others read this rank's shard in its memory, and the result has large pages, as is likely from a size
        on: looking up small ones takes half of the time. Of messages; `reads` always does so."""
        return self._direct() and self.core.situation.shared and sum(self.sizes()) >= _LARGE

    def reads(self) -> bool:
        return self._direct() and self.core.peer_memory is not None and not self.core.checksums

    def most(self) -> int:
        return self.core.rounds.capacity

    def _direct(self) -> bool:
        """Whether everyone sends to everyone, in host memory."""
        direct = self.chosen is not None and self.chosen.algorithm == "direct"
        return direct and self.gpu is None and self.core.size > 1

    def home(self) -> int:
        assert self.out is not None
        return self.out.address + sum(self.sizes()[: self.core.rank])

    def native(self) -> NativeRequest:
        assert self.out is not None
        return NativeRequest(self.collective, self.send.address, self.out.address, self.sizes(), None, 1, None)


class AllGatherV(AllGather):
    """Shards whose number of rows differs."""

    name = "decomposed_allgatherv"
    repeatable = False  # ranks may come with other rows

    def key(self) -> tuple[Any, ...]:
        return Shape.of(self.send.shape).rest, self.send.dtype, bool(self.send.shape)

    def describe(self) -> Call:
        rest = list(Shape.of(self.send.shape).rest)
        return Call.of(
            call=self.name,
            row_shape=rest,
            dtype=self.send.dtype,
            algorithm=self.options.label,
            rings=None if self.options.rings is None else int(self.options.rings),
        )

    def prepare(self, recv: Any) -> None:
        if not self.send.shape:
            raise ArgumentError("send must have an axis 0 to be gathered along, got a 0-d array")
        self._rows, self._rest = Shape.of(self.send.shape)
        self._row_bytes = Shape.of(self.send.shape).row_elements * self.send.itemsize
        self._counts: tuple[int, ...] = ()
        self._room = self._place = -1
        if recv is None:
            return
        out = arrays.describe(recv, "recv")
        by_rows = len(out.shape) == len(self.send.shape)
        self._room = out.shape[0] if by_rows else out.nbytes // self._row_bytes if self._row_bytes else -1
        if arrays.overlap(self.send, out):
            offset = self.send.address - out.address
            self._place = offset // self._row_bytes if self._row_bytes and offset % self._row_bytes == 0 else -1
        shape = (self._room, *self._rest)
        self.out = self.receive(recv, shape, self._place * self._row_bytes if self._place >= 0 else None)

    def header(self) -> Header:
        if self.error is not None:
            return super().header()
        return super().header()._replace(rows=self._rows, room=self._room, place=self._place)

    def inline(self) -> bool:
        return all(header.payload != NOT_INLINE for header in self._headers)

    def agree(self) -> Steps:
        yield from super().agree()
        self._headers = self.core.rounds.headers()
        self._counts = tuple(header.rows for header in self._headers)
        total, at = sum(self._counts), 0
        faults = []
        for rank, header in enumerate(self._headers):
            if header.room not in (-1, total):
                faults.append((rank, f"recv must have {total} rows, the sum over ranks, got {header.room}"))
            elif header.place not in (-1, at) and header.rows:
                faults.append((rank, f"send must lie at row {at} of recv to be in place, it is at {header.place}"))
            at += header.rows
        if faults:
            told = "; ".join(f"rank {rank}: {rule}" for rank, rule in faults)
            raise MismatchError(f"{self.name}: {told}", [rank for rank, _ in faults])
        if self.out is None:
            self.out = arrays.new(self.send, (total, *self._rest))

    def sizes(self) -> tuple[int, ...]:
        return tuple(rows * self._row_bytes for rows in self._counts)

    def unpack(self) -> None:
        assert self.out is not None
        at, rounds = self.out.address, self.core.rounds
        for rank, nbytes in enumerate(self.sizes()):
            ctypes.memmove(at, rounds.payload(rank), nbytes)
            at += nbytes


class _Reducing(Collective):
    """What ReduceScatter and AllReduce share."""

    how: Reduction

    def key(self) -> tuple[Any, ...]:
        return self.send.shape, self.send.dtype, self.options.op

    def describe(self) -> Call:
        call = super().describe()
        return Call.of(**dict(call.described), op=str(self.options.op))

    def native(self) -> NativeRequest:
        assert self.out is not None
        how = self.how
        return NativeRequest(
            self.collective,
            self.send.address,
            self.out.address,
            self.counts(),
            how.dtype,
            how.itemsize,
            self.options.op,
        )

    def apart(self, request: NativeRequest) -> NativeRequest:
        """MPI wants what is scattered and the result apart, even where one is empty."""
        assert self.out is not None
        aliased = self.out.address == self.send.address or arrays.overlap(self.send, self.out)
        if self.collective != "reduce_scatter" or not aliased:
            return request
        self._copy: Any = ctypes.create_string_buffer(self.send.nbytes)
        ctypes.memmove(self._copy, self.send.address, self.send.nbytes)
        return request._replace(send=ctypes.addressof(self._copy))

    def let_go(self) -> None:
        super().let_go()
        self._copy = None

    def counts(self) -> tuple[int, ...]:
        """Elements of each rank's shard."""
        raise NotImplementedError

    def sizes(self) -> tuple[int, ...]:
        return tuple(count * self.how.itemsize for count in self.counts())

    def _reduce_payloads(self, dst: int, start: int, count: int) -> None:
        """Sum elements start.. of every rank's payload, in the order of ranks, on all ranks alike."""
        how, rounds = self.how, self.core.rounds
        total = ctypes.create_string_buffer(max(count * how.wire_itemsize, 1))
        at = ctypes.addressof(total)
        how.widen(at, rounds.payload(0) + start * how.itemsize, count)
        for rank in range(1, rounds.size):
            how.combine(at, rounds.payload(rank) + start * how.itemsize, count)
        how.finish(dst, at, count)


class ReduceScatter(_Reducing):
    """Every rank's shard of the sum of all ranks' arrays."""

    collective, name = "reduce_scatter", "decomposed_reduce_scatter"

    def prepare(self, recv: Any) -> None:
        self.how = reduction(self.options.op, self.send.dtype, self.core.size)
        if not self.send.shape:
            raise ArgumentError("send must have an axis 0 to be scattered along, got a 0-d array")
        rows, rest = Shape.of(self.send.shape)
        self._row_elements = Shape.of(self.send.shape).row_elements
        self._rows = self._split(rows)
        before = sum(self._rows[: self.core.rank]) * self._row_elements * self.send.itemsize
        self.out = self.receive(recv, (self._rows[self.core.rank], *rest), None)
        if recv is not None and arrays.overlap(self.send, self.out) and self.out.address != self.send.address + before:
            raise ArgumentError("recv must not overlap send, unless it is exactly this rank's own part of it")

    def receive(self, recv: Any, shape: tuple[int, ...], in_place: int | None) -> Buffer:
        """Here `recv` may lie in `send`."""
        if recv is None:
            return super().receive(recv, shape, in_place)
        out = arrays.describe(recv, "recv")
        return super().receive(recv, shape, self.send.address - out.address)

    def _split(self, rows: int) -> tuple[int, ...]:
        counts, size = self.options.counts, self.core.size
        if counts is None:
            if rows % size:
                raise ArgumentError(
                    f"send must have an axis 0 that {size} ranks divide, got {rows} rows; give counts for uneven parts"
                )
            return (rows // size,) * size
        whole = isinstance(counts, tuple) and all(type(part) is int and part >= 0 for part in counts)
        if not whole or len(counts) != size or sum(counts) != rows:
            raise ArgumentError(
                f"counts must be {size} integers >= 0 that add up to send's {rows} rows, got {counts!r}"
            )
        return tuple(counts)

    def counts(self) -> tuple[int, ...]:
        return tuple(rows * self._row_elements for rows in self._rows)

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        return (reduce_program(schedule, self.core.rank, self.counts(), self.how),)

    def bases(self) -> Sequence[dict[str, int]]:
        assert self.out is not None
        return ({"send": self.send.address, "recv": self.out.address},)

    def unpack(self) -> None:
        assert self.out is not None
        counts = self.counts()
        self._reduce_payloads(self.out.address, sum(counts[: self.core.rank]), counts[self.core.rank])


class AllReduce(_Reducing):
    """The sum of all ranks' arrays on every rank: a reduce-scatter of parts, then their allgather."""

    collective, name = "allreduce", "decomposed_allreduce"

    def prepare(self, recv: Any) -> None:
        self.how = reduction(self.options.op, self.send.dtype, self.core.size)
        self._elements = self.send.nbytes // self.how.itemsize
        self.out = self.receive(recv, self.send.shape, 0)

    def counts(self) -> tuple[int, ...]:
        """Parts of nearly equal size that begin on cache lines."""
        bounds = cut(self._elements, uniform_weights(self.core.size), max(ALIGN // self.how.itemsize, 1))
        return tuple(stop - start for start, stop in pairwise(bounds))

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        first, second = schedule.phases()
        reduce = reduce_program(first, self.core.rank, self.counts(), self.how)
        return reduce, gather_program(second, self.core.rank, self.sizes())

    def bases(self) -> Sequence[dict[str, int]]:
        assert self.out is not None
        mine = self.out.address + (0, *accumulate(self.sizes()))[self.core.rank]
        return {"send": self.send.address, "recv": mine}, {"send": mine, "recv": self.out.address}

    def unpack(self) -> None:
        assert self.out is not None
        self._reduce_payloads(self.out.address, 0, self._elements)


class AllToAll(Collective):
    """Block d of each rank's array goes to rank d; the result has the blocks in the order of their ranks."""

    collective, name = "all_to_all", "all_to_all"

    def key(self) -> tuple[Any, ...]:
        return self.send.shape, self.send.dtype

    def prepare(self, recv: Any) -> None:
        size = self.core.size
        if not self.send.shape or self.send.shape[0] % size:
            raise ArgumentError(f"send must have an axis 0 that {size} ranks divide, got shape {self.send.shape}")
        self._block = self.send.nbytes // size
        self.out = self.receive(recv, self.send.shape, None)

    def sizes(self) -> tuple[int, ...]:
        return (self._block,) * self.core.size

    def choose(self) -> Choice:
        return Choice("direct")

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        return (all_to_all_program(schedule, self.core.rank, self._block),)

    def bases(self) -> Sequence[dict[str, int]]:
        assert self.out is not None
        return ({"send": self.send.address, "recv": self.out.address},)

    def own(self) -> list[tuple[int, int, int]]:
        return [self._place(self.core.rank, self.send.address)]

    def unpack(self) -> None:
        for rank in range(self.core.size):
            ctypes.memmove(*self._place(rank, self.core.rounds.payload(rank)))

    def _place(self, rank: int, address: int) -> tuple[int, int, int]:
        """Where this rank's block of the array at `address`, which `rank` sent, belongs; where it is; its bytes."""
        assert self.out is not None
        return self.out.address + rank * self._block, address + self.core.rank * self._block, self._block
