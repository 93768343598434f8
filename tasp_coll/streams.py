"""Collectives one step at a time: the caller works on one step while the next one travels.

Opening a stream is an operation like any other, with its agreement. From then on the engine polls it in the
background; the caller's side is an iterator that lets a step's memory go when the next step is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tasp_coll import arrays
from tasp_coll.agreement import Header
from tasp_coll.core import SLOTS, Arena, Compiled, Core, Shape
from tasp_coll.errors import ArgumentError, ArgumentTypeError
from tasp_coll.executor import Flow, Piece, Program
from tasp_coll.forecast import Choice, choice_of
from tasp_coll.operations import Collective, Steps
from tasp_coll.options import Call, Options
from tasp_coll.programs import gather_steps_program
from tasp_coll.reduce_programs import reduce_steps_program
from tasp_coll.reduction import reduction
from tasp_coll.schedule import Schedule
from tasp_coll.tuning import stepwise

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
            rings=None if self.options.rings is None else int(self.options.rings),
            reverse=self.options.extra or None,
        )

    def prepare(self, recv: Any) -> None:
        if self.options.algorithm not in self.algorithms():
            raise ArgumentError(
                f"algorithm must be one of {', '.join(self.algorithms())} to go step by step"
                f"{' in reverse' if self.options.extra else ''}, got {self.options.label!r}"
            )
        if not self.send.shape:
            raise ArgumentError("an axis 0 is needed to go by rows, got a 0-d array")
        self._shape = Shape.of(self.send.shape)
        self.row_elements = self._shape.row_elements
        self.rows: tuple[int, ...] = ()

    def algorithms(self) -> tuple[str, ...]:
        """Those that can go step by step. Only rings and slices have a mirror image in step with them."""
        return ("auto", "rings", "ring", "direct")

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
        options, core = self.options, self.core
        name = options.named or stepwise(core.topology, self.algorithms())
        if name == "direct":
            return Choice(name)  # a slice from every peer at each step
        return choice_of(name, self.collective, core.size, max(self.sizes(), default=0), options.rings)

    def arena(self) -> Arena:
        return Arena()

    def compiled_key(self) -> tuple[Any, ...]:
        return (*super().compiled_key(), self.slot)

    def inline(self) -> bool:
        return False


class OpenGather(_Open):
    """Opens `allgather_steps`."""

    collective, name = "allgather", "allgather_steps"

    def algorithms(self) -> tuple[str, ...]:
        return super().algorithms() if self.options.extra else (*super().algorithms(), "hierarchical")

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        row_bytes = self.row_elements * self.send.itemsize
        return (gather_steps_program(schedule, self.core.rank, self.rows, row_bytes),)

    def _schedule(self) -> Schedule:
        assert self.chosen is not None
        return self.core.schedule(self.collective, self.chosen, reverse=bool(self.options.extra))


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


class _Driver:
    """The engine's side of an open stream. It knows nothing of the iterator, so that dropping that ends the stream."""

    def __init__(self, core: Core, opened: _Open, compiled: Compiled, bases: dict[str, int]) -> None:
        self.core, self.opened, self.compiled = core, opened, compiled
        self.error: BaseException | None = None
        self.ended = self.orphan = False
        opened.phase = "moving data"
        compiled.held = True
        opened.flow = self.flow = Flow(compiled.exchange(0, bases))
        core.engine.attach(self, opened)

    def poll(self) -> bool:
        """Make progress; an error is kept for the caller."""
        if self.error is not None:
            return False
        if self.orphan:  # nobody will ask for the rest
            self.orphan, self.ended = False, True
            self._open_all()
        if self.flow.done:
            if self.ended:
                self._leave()
            return False
        try:
            return self.flow.poll()
        except BaseException as error:
            self.error = self.core.engine.judge(error, self.opened)
            return True

    def open(self, gate: object) -> None:
        """Let go on what waits for the caller."""
        with self.core.engine.lock:
            self.flow.open(gate)

    def wait(self, until: Callable[[], bool]) -> None:
        """Drive until then; raises what went wrong."""
        self.core.engine.drive(lambda: self.error is not None or until(), self.opened)
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Carry out all that is left, with what is there, and detach."""
        if self.ended:
            return
        self.ended = True
        engine = self.core.engine
        try:
            if not engine.broken:
                self._open_all()
                self.wait(lambda: self.flow.done)
        finally:
            self._leave()

    def _open_all(self) -> None:
        for gate in self.compiled.programs[0].gates:
            self.open(gate)

    def _leave(self) -> None:
        self.core.engine.detach(self)
        if not self.core.engine.broken:
            self.core.streams.discard(self.opened.slot)
            self.compiled.release()


class _Stream(Iterator[Arrival]):
    """An open stream; iterate over it, or leave early: then what is under way is brought to its end."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self._next = 0
        self._layout = driver.compiled.programs[0].layout

    def __iter__(self) -> _Stream:
        return self

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        driver = getattr(self, "_driver", None)
        if driver is None:
            return
        if driver.core.engine.inside:  # the collector called from inside a poll: no waiting here
            driver.orphan = not driver.ended
        else:
            driver.finish()

    def close(self) -> None:
        """End the stream: all ranks' remaining steps are carried out, with what is there. Waits for the peers."""
        self._driver.finish()

    def _pieces(self, readonly: bool) -> Arrival:
        step, self._next = self._next, self._next + 1
        return Arrival(step, tuple(self._chunk(piece, readonly) for piece in self._layout[step]))

    def _chunk(self, piece: Piece, readonly: bool) -> Chunk:
        like = self._driver.opened.send
        memory, offset = self._driver.compiled.arena.memory, piece.place.offset
        if piece.place.region == "send":
            memory, offset = arrays.memory_at(like.address + offset, piece.place.nbytes), 0
        # torch has no read-only view, only a copy: there the caller is trusted.
        shape = (piece.stop - piece.start, *Shape.of(like.shape).rest)
        data = arrays.view(like, memory, offset, shape, readonly=readonly and like.kind != "torch")
        return Chunk(piece.source, piece.ring, piece.start, piece.stop, data)


class GatherStream(_Stream):
    """Iterator over the arrivals of `allgather_steps`."""

    def __next__(self) -> Arrival:
        step, driver = self._next, self._driver
        if driver.ended:
            raise StopIteration
        if step >= 2:
            driver.open(("release", step - 2))
        if step == len(self._layout):
            driver.finish()
            raise StopIteration
        if step:
            driver.wait(lambda: driver.flow.reached(("arrived", step - 1)))
        return self._pieces(readonly=True)


class ReduceStream(_Stream):
    """Iterator over the requests of `reduce_scatter_steps`."""

    def __next__(self) -> Arrival:
        step, driver = self._next, self._driver
        if driver.ended:
            raise StopIteration
        if step:
            driver.open(("fill", step - 1))
        if step == len(self._layout):
            driver.finish()
            raise StopIteration
        driver.wait(lambda: driver.flow.reached(("used", step - 2)))
        return self._pieces(readonly=False)


def open_gather(core: Core, send: Any, options: Options) -> GatherStream:
    """Agree, and start an allgather step by step."""
    opened = OpenGather(core, send, None, options)
    compiled = core.engine.run(opened)
    return GatherStream(_Driver(core, opened, compiled, {"send": opened.send.address}))


def open_reduce(core: Core, recv: Any, options: Options) -> ReduceStream:
    """Agree, and start a reduce-scatter step by step into `recv`."""
    opened = OpenReduce(core, recv, None, options)
    if opened.error is None and not arrays.describe(recv, "recv").contiguous:
        opened.error = ArgumentError(f"recv must be contiguous, got a strided array of shape {opened.send.shape}")
    compiled = core.engine.run(opened)
    return ReduceStream(_Driver(core, opened, compiled, {"recv": opened.send.address}))
