"""Collectives one step at a time: the caller works on one step while the next one travels.

Opening a stream is an operation like any other, with its agreement. From then on the engine polls it in the
background; the caller's side is an iterator that lets a step's memory go when the next step is asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasp_coll import arrays
from tasp_coll.agreement import Header
from tasp_coll.core import SLOTS, Compiled, Core, Shape
from tasp_coll.errors import ArgumentError, ArgumentTypeError
from tasp_coll.executor import Flow, Piece, Program
from tasp_coll.operations import Call, Collective, Options, Steps
from tasp_coll.programs import gather_steps_program
from tasp_coll.reduce_programs import reduce_steps_program
from tasp_coll.reduction import reduction
from tasp_coll.schedule import Schedule
from tasp_coll.tuning import Choice

_ALL_SLOTS = (1 << SLOTS) - 2  # slot 0 is for calls


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of rank `source`'s shard, on ring `ring`. data: (stop - start, *rest), a view."""

    source: int
    ring: int
    start: int
    stop: int
    data: Any


@dataclass(frozen=True)
class Arrival:
    """What one step brings, or asks for; valid until the next iteration."""

    step: int
    chunks: tuple[Chunk, ...]


class _Open(Collective):
    """Opens a stream: agreement on the call, rows of each rank, a free slot, and the compiled plan."""

    def key(self) -> tuple[Any, ...]:
        return Shape.of(self.send.shape).rest, self.send.dtype

    def describe(self) -> Call:
        return Call.of(
            call=self.name,
            row_shape=list(Shape.of(self.send.shape).rest),
            dtype=self.send.dtype,
            algorithm=self.options.label,
            rings=self.options.rings,
            reverse=self.options.extra or None,
        )

    def prepare(self, recv: Any) -> None:
        if self.options.algorithm == "native" or isinstance(self.options.algorithm, Schedule):
            raise ArgumentError(
                f"algorithm must be auto, rings, ring or direct to go step by step, got {self.options.label!r}"
            )
        if not self.send.shape:
            raise ArgumentError("an axis 0 is needed to go by rows, got a 0-d array")
        self._shape = Shape.of(self.send.shape)
        self.row_elements = 1
        for extent in self._shape.rest:
            self.row_elements *= extent
        self.rows: tuple[int, ...] = ()

    def header(self) -> Header:
        if self.error is not None:
            return super().header()
        free = _ALL_SLOTS & ~sum(1 << slot for slot in self.core.streams)
        return Header(self.call.signature, rows=self._shape.rows, room=free)

    def sizes(self) -> tuple[int, ...]:
        return tuple(rows * self.row_elements * self.send.itemsize for rows in self.rows)

    def run(self) -> Steps:
        yield from self.agree()
        headers = self.core.rounds.headers()
        self.rows = tuple(header.rows for header in headers)
        # A slot that is free on every rank: ranks may be done with earlier streams at different times.
        free = _ALL_SLOTS
        for header in headers:
            free &= header.room
        if not free:
            raise ArgumentError(f"{self.name}: {SLOTS - 1} streams of steps are open already, close one first")
        self.slot = (free & -free).bit_length() - 1
        self.chosen = self._choose()
        compiled = yield from self._compiled()
        self.core.streams.add(self.slot)
        return compiled

    def _choose(self) -> Choice:
        options = self.options
        if options.algorithm == "direct":
            return Choice("direct")
        one = options.algorithm == "ring" or (
            options.algorithm == "auto" and options.rings is None and self.core.topology.is_single_switch
        )
        return Choice("ring") if one else Choice("rings", options.rings)

    def compiled_key(self) -> tuple[Any, ...]:
        return (*super().compiled_key(), self.slot)

    def inline(self) -> bool:
        return False


class OpenGather(_Open):
    """Opens `allgather_steps`."""

    collective, name = "allgather", "allgather_steps"

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        row_bytes = self.row_elements * self.send.itemsize
        return (gather_steps_program(schedule, self.core.rank, self.rows, row_bytes),)

    def _schedule(self) -> Schedule:
        return self.core.schedule(self.collective, self._choose(), reverse=bool(self.options.extra))


class OpenReduce(_Open):
    """Opens `reduce_scatter_steps`; its array is the one that receives the sums."""

    collective, name = "reduce_scatter", "reduce_scatter_steps"

    def prepare(self, recv: Any) -> None:
        super().prepare(recv)
        self.how = reduction("sum", self.send.dtype, self.core.size)
        if self.send.readonly:
            raise ArgumentTypeError(f"recv must be writable, got a read-only {self.send.kind} array")

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        return (reduce_steps_program(schedule, self.core.rank, self.rows, self.row_elements, self.how),)


class _Stream(Iterator[Arrival]):
    """An open stream; iterate over it, or leave early: then what is under way is brought to its end."""

    def __init__(self, core: Core, opened: _Open, compiled: Compiled, bases: dict[str, int]) -> None:
        self._core, self._opened, self._compiled = core, opened, compiled
        self.name = opened.name
        self._error: BaseException | None = None
        self._next = 0
        self._closed = False
        self._layout = compiled.programs[0].layout
        opened.flow = self._flow = Flow(compiled.exchange(0, bases))
        core.engine.attach(self, opened)

    def __iter__(self) -> _Stream:
        return self

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def poll(self) -> bool:
        """For the engine: make progress; an error is kept for the caller."""
        if self._error is not None or self._flow.done:
            return False
        try:
            return self._flow.poll()
        except BaseException as error:
            self._error = self._core.engine.judge(error, self._opened)
            return True

    def pending(self) -> tuple[set[int], int | None]:
        """Who is waited for."""
        return self._flow.pending()

    def close(self) -> None:
        """End the stream: all ranks' remaining steps are carried out, with what is there. Waits for the peers."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._core.engine.broken:
                self._open_all()
                self._wait(lambda: self._flow.done)
        finally:
            self._core.engine.detach(self)
            if not self._core.engine.broken:
                self._core.streams.discard(self._opened.slot)

    def _open_all(self) -> None:
        for gate in self._compiled.programs[0].gates:
            self._open_gate(gate)

    def _open_gate(self, gate: object) -> None:
        with self._core.engine.lock:
            self._flow.open(gate)

    def _wait(self, until: Any) -> None:
        self._core.engine.drive(lambda: self._error is not None or until(), self._opened)
        if self._error is not None:
            self._closed = True
            raise self._error

    def _chunk(self, piece: Piece, readonly: bool) -> Chunk:
        like = self._opened.send
        memory = self._compiled.staging
        offset = piece.place.offset
        if piece.place.region == "send":
            memory, offset = self._shard[offset : offset + piece.place.nbytes], 0
        # torch has no read-only view, only a copy: there the caller is trusted.
        shape = (piece.stop - piece.start, *Shape.of(like.shape).rest)
        data = arrays.view(like, memory, offset, shape, readonly=readonly and like.kind != "torch")
        return Chunk(piece.source, piece.ring, piece.start, piece.stop, data)

    @property
    def _shard(self) -> Any:
        send = self._opened.send
        if not send.nbytes:
            return np.empty(0, np.uint8)
        memory: Any = (ctypes.c_char * send.nbytes).from_address(send.address)
        return np.frombuffer(memory, np.uint8)


class GatherStream(_Stream):
    """Iterator over the arrivals of `allgather_steps`."""

    def __next__(self) -> Arrival:
        step = self._next
        if self._closed:
            raise StopIteration
        if step >= 2:
            self._open_gate(("release", step - 2))
        if step == len(self._layout):
            self.close()
            raise StopIteration
        if step:
            self._wait(lambda: self._flow.reached(("arrived", step - 1)))
        self._next += 1
        return Arrival(step, tuple(self._chunk(piece, True) for piece in self._layout[step]))


class ReduceStream(_Stream):
    """Iterator over the requests of `reduce_scatter_steps`."""

    def __next__(self) -> Arrival:
        step = self._next
        if self._closed:
            raise StopIteration
        if step:
            self._open_gate(("fill", step - 1))
        if step == len(self._layout):
            self.close()
            raise StopIteration
        self._wait(lambda: self._flow.reached(("used", step - 2)))
        self._next += 1
        return Arrival(step, tuple(self._chunk(piece, False) for piece in self._layout[step]))


def open_gather(core: Core, send: Any, options: Options) -> GatherStream:
    """Agree, and start an allgather step by step."""
    opened = OpenGather(core, send, None, options)
    compiled = core.engine.run(opened)
    return GatherStream(core, opened, compiled, {"send": opened.send.address})


def open_reduce(core: Core, recv: Any, options: Options) -> ReduceStream:
    """Agree, and start a reduce-scatter step by step into `recv`."""
    opened = OpenReduce(core, recv, None, options)
    if opened.error is None and not arrays.describe(recv, "recv").contiguous:
        opened.error = ArgumentError(f"recv must be contiguous, got a strided array of shape {opened.send.shape}")
    compiled = core.engine.run(opened)
    return ReduceStream(core, opened, compiled, {"recv": opened.send.address})
