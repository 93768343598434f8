"""Collectives one step at a time: the caller works on one step while the next one travels.

Once a stream is open, the engine polls it in the background, or a GPU runs it (`gpu_steps`); the caller's side is an
iterator that lets a step's memory go when the next step is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Protocol

from tasp_coll import arrays, checksums
from tasp_coll.arrivals import Arrival, Chunk, Views
from tasp_coll.core import Compiled, Core
from tasp_coll.errors import ArgumentError, CollectiveError
from tasp_coll.executor import Flow, Program
from tasp_coll.layouts import Layout, Rows
from tasp_coll.openings import OpenGather, Opening, OpenReduce
from tasp_coll.options import Options
from tasp_coll.schedule import Schedule


class Driver(Protocol):
    """What carries an open stream out. It knows nothing of the iterator, so that dropping that ends the stream."""

    opened: Any  # Opening
    ended: bool

    @property
    def program(self) -> Program:
        """What it runs."""

    @property
    def memory(self) -> arrays.NDArray | arrays.DeviceBytes:
        """Where it stages."""

    def open(self, gate: tuple[str, int]) -> None:
        """The caller is done with a step."""

    def reach(self, step: int) -> None:
        """Until the step is there, or can be filled."""

    def times(self, step: int) -> tuple[float | None, float | None]:
        """When what it brings travelled."""

    def looking(self) -> AbstractContextManager[Any]:
        """Where the caller's arrays of a step are made."""

    def check(self) -> None:
        """Raise where what has come is not to be trusted."""

    def finish(self) -> None:
        """Carry out all that is left, with what is there."""

    def drop(self) -> None:
        """The same for the garbage collector, which must not wait."""


class HostDriver:
    """In host memory: the engine polls it in the background."""

    def __init__(self, opened: Opening, compiled: Compiled) -> None:
        self.core, self.opened, self.compiled = opened.core, opened, compiled
        self.error: BaseException | None = None
        self.ended = self.orphan = False
        self.slack = 0.0  # seconds by which what the caller asked for last was early
        opened.phase = "moving data"
        compiled.held = True
        opened.flow = self.flow = Flow(compiled.exchange(0, {opened.region: opened.send.address}))
        self.core.engine.attach(self, opened)

    @property
    def program(self) -> Program:
        """What it runs."""
        return self.compiled.programs[0]

    @property
    def memory(self) -> arrays.NDArray:
        """Where it stages."""
        return self.compiled.arena.memory

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
            self._fail(error)
            return True

    @property
    def resting(self) -> bool:
        """Whether all waits for the caller."""
        return self.flow.resting and self.error is None and not self.orphan

    def open(self, gate: tuple[str, int]) -> None:
        """Let go on what waits for the caller."""
        with self.core.engine.lock:
            if self.core.engine.broken:  # nothing new may start; whoever waits is told
                return
            rested = self.resting
            try:
                self.flow.open(gate)
            except BaseException as error:
                self._fail(error)
        if rested:
            self.core.engine.rouse()

    def _fail(self, error: BaseException) -> None:
        self.error = self.core.engine.judge(error, self.opened)
        if not isinstance(error, Exception):  # Ctrl-C is for whoever is waiting
            raise error

    def reach(self, step: int) -> None:
        """Wait until what comes is there, and memory that is asked for is free."""
        flow, marks = self.flow, (("arrived", step), ("free", step))
        early = flow.early(*marks)
        self.slack = self.slack if early is None else early
        self.wait(lambda: all(map(flow.reached, marks)))

    def times(self, step: int) -> tuple[float | None, float | None]:
        """When what it brings travelled."""
        mark = ("arrived", step)
        return self.flow.began.get(mark), self.flow.ended.get(mark)

    def looking(self) -> AbstractContextManager[Any]:
        """Anywhere."""
        return nullcontext()

    def wait(self, until: Callable[[], bool]) -> None:
        """Drive until then; raises what went wrong."""
        self.core.engine.drive(lambda: self.error is not None or until(), self.opened, patient=True)
        if self.error is not None:
            raise self.error

    def check(self) -> None:
        """Raise where what has come is not to be trusted: the communicator has failed, or a checksum says so.

        CorruptionError comes after the rest has come as well: all messages are at home then.
        """
        if self.core.engine.broken:
            raise self.error or CollectiveError(self.core.engine.broken)
        faults = self.flow.exchange.faults
        if faults:
            first = checksums.encode(faults).decode()
            self.finish()
            raise checksums.corruption(self.opened.name, [first])

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

    def drop(self) -> None:
        """Finish; if the collector called from inside a poll, let the engine do it."""
        if self.core.engine.inside:
            self.orphan = not self.ended
        else:
            self.finish()

    def _open_all(self) -> None:
        with self.core.engine.lock:
            for gate in self.program.gates:
                self.flow.open(gate)

    def _leave(self) -> None:
        self.core.engine.detach(self)
        if not self.core.engine.broken:
            self.core.streams.discard(self.opened.slot)
            self.compiled.release()


class _Stream(Iterator[Arrival]):
    """An open stream; iterate over it, or leave early: then what is under way is brought to its end."""

    gate = ""  # what the caller opens by asking for the next step
    readonly = True

    def __init__(self, driver: Driver) -> None:
        self._views: Views | None = None
        self._driver = driver
        self._next = 0
        self._program = driver.program

    @cached_property
    def layout(self) -> Layout:
        """Per step the `Rows` (source, ring, start, stop) of its chunks; see `Schedule.arrivals`."""
        return tuple(tuple(Rows(*piece[:4]) for piece in pieces) for pieces in self._program.layout)

    @property
    def schedule(self) -> Schedule:
        """The plan that it runs; its `arrivals` tell the layout on any rank."""
        found: Schedule = self._driver.opened.schedule()
        return found

    def __iter__(self) -> _Stream:
        return self

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if not self._driver.ended:
            self._driver.opened.core.engine.interrupted(kind)
        self.close()

    def __del__(self) -> None:
        driver = getattr(self, "_driver", None)
        if driver is None:
            return
        self._let_go()
        driver.drop()

    def close(self) -> None:
        """End the stream: all ranks' remaining steps are carried out, with what is there. Waits for the peers; on a GPU
        the caller's stream does."""
        self._let_go()
        self._driver.finish()

    def _let_go(self) -> None:
        """What was handed over last is valid no more."""
        if self._views is not None:
            self._views.over = True

    def release(self) -> None:
        """Be done with the step that came last, before the next is asked for: its memory may be used again, and what
        was filled travels on. Not needed, but the earlier the better."""
        if self._views is not None and not self._views.over:
            self._let_go()
            self._driver.open((self.gate, self._next - 1))

    def __next__(self) -> Arrival:
        step, driver = self._next, self._driver
        if driver.ended:
            self._let_go()
            raise StopIteration
        self.release()
        if step == len(self._program.layout):
            driver.finish()
            driver.check()
            raise StopIteration
        driver.reach(step)
        return self._hand_over()

    def _hand_over(self) -> Arrival:
        self._driver.check()
        step, self._next = self._next, self._next + 1
        driver, program = self._driver, self._program
        self._views = views = Views(driver.opened.send, driver.memory, self.readonly, driver.looking)
        chunks = tuple(Chunk(*piece, views) for piece in program.layout[step])
        return Arrival(step, chunks, *driver.times(step), program.stretches[step], views)


class GatherStream(_Stream):
    """Iterator over the arrivals of `allgather_steps`."""

    gate, readonly = "release", True


class ReduceStream(_Stream):
    """Iterator over the requests of `reduce_scatter_steps`."""

    gate, readonly = "fill", False


def open_gather(core: Core, send: Any, options: Options, donate: bool) -> GatherStream:
    """Agree, and start an allgather step by step. donate: `send`'s memory is ours from now on."""
    return GatherStream(_opened(OpenGather(core, send, options, donate)))


def open_reduce(core: Core, recv: Any, options: Options) -> ReduceStream:
    """Agree, and start a reduce-scatter step by step into `recv`."""
    opened = OpenReduce(core, recv, None, options)
    if opened.error is None and not arrays.describe(recv, "recv").contiguous:
        opened.error = ArgumentError(f"recv must be contiguous, got a strided array of shape {opened.send.shape}")
    return ReduceStream(_opened(opened))


def _opened(opened: Opening) -> Driver:
    found = opened.core.engine.run(opened)
    return HostDriver(opened, found) if isinstance(found, Compiled) else found
