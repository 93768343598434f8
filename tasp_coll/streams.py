"""Collectives one step at a time: the caller works on one step while the next one travels.

Once a stream is open, the engine polls it in the background; the caller's side is an iterator that lets a step's
memory go when the next step is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from tasp_coll import arrays, checksums
from tasp_coll.arrivals import Arrival, Chunk, Views
from tasp_coll.core import Compiled, Core
from tasp_coll.errors import ArgumentError, CollectiveError
from tasp_coll.executor import Flow
from tasp_coll.layouts import Layout, Rows
from tasp_coll.openings import OpenGather, Opening, OpenReduce
from tasp_coll.options import Options
from tasp_coll.schedule import Schedule


class _Driver:
    """The engine's side of an open stream. It knows nothing of the iterator, so that dropping that ends the stream."""

    def __init__(self, core: Core, opened: Opening, compiled: Compiled, bases: dict[str, int]) -> None:
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
            self._fail(error)
            return True

    def open(self, gate: object) -> None:
        """Let go on what waits for the caller."""
        with self.core.engine.lock:
            if self.core.engine.broken:  # nothing new may start; whoever waits is told
                return
            try:
                self.flow.open(gate)
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.error = self.core.engine.judge(error, self.opened)
        if not isinstance(error, Exception):  # Ctrl-C is for whoever is waiting
            raise error

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
        self._views: Views | None = None
        self._driver = driver
        self._next = 0
        self._program = driver.compiled.programs[0]

    @cached_property
    def layout(self) -> Layout:
        """Per step the `Rows` (source, ring, start, stop) of its chunks; see `Schedule.arrivals`."""
        return tuple(tuple(Rows(*piece[:4]) for piece in pieces) for pieces in self._program.layout)

    @property
    def schedule(self) -> Schedule:
        """The plan that it runs; its `arrivals` tell the layout on any rank."""
        return self._driver.opened._schedule()

    def __iter__(self) -> _Stream:
        return self

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if not self._driver.ended:
            self._driver.core.engine.interrupted(kind)
        self.close()

    def __del__(self) -> None:
        driver = getattr(self, "_driver", None)
        if driver is None:
            return
        self._let_go()
        if driver.core.engine.inside:  # the collector called from inside a poll: no waiting here
            driver.orphan = not driver.ended
        else:
            driver.finish()

    def close(self) -> None:
        """End the stream: all ranks' remaining steps are carried out, with what is there. Waits for the peers."""
        self._let_go()
        self._driver.finish()

    def _let_go(self) -> None:
        """What was handed over last is valid no more."""
        if self._views is not None:
            self._views.over = True

    def _hand_over(self, readonly: bool) -> Arrival:
        self._driver.check()
        step, self._next = self._next, self._next + 1
        driver, program, mark = self._driver, self._program, ("arrived", step)
        self._views = views = Views(driver.opened.send, driver.compiled.arena.memory, readonly)
        chunks = tuple(Chunk(*piece, views) for piece in program.layout[step])
        began, ended = driver.flow.began.get(mark), driver.flow.ended.get(mark)
        return Arrival(step, chunks, began, ended, program.stretches[step], views)


class GatherStream(_Stream):
    """Iterator over the arrivals of `allgather_steps`."""

    def __next__(self) -> Arrival:
        step, driver = self._next, self._driver
        self._let_go()
        if driver.ended:
            raise StopIteration
        if step:
            driver.open(("release", step - 1))
        if step == len(self._program.layout):
            driver.finish()
            driver.check()
            raise StopIteration
        driver.wait(lambda: driver.flow.reached(("arrived", step)))
        return self._hand_over(readonly=True)


class ReduceStream(_Stream):
    """Iterator over the requests of `reduce_scatter_steps`."""

    def __next__(self) -> Arrival:
        step, driver = self._next, self._driver
        self._let_go()
        if driver.ended:
            raise StopIteration
        if step:
            driver.open(("fill", step - 1))
        if step == len(self._program.layout):
            driver.finish()
            driver.check()
            raise StopIteration
        # Programs have either the one or the other: sums that come, or memory that is free again.
        driver.wait(lambda: driver.flow.reached(("arrived", step)) and driver.flow.reached(("used", step - 2)))
        return self._hand_over(readonly=False)


def open_gather(core: Core, send: Any, options: Options, donate: bool) -> GatherStream:
    """Agree, and start an allgather step by step. donate: `send`'s memory is ours from now on."""
    opened = OpenGather(core, send, options, donate)
    compiled = core.engine.run(opened)
    return GatherStream(_Driver(core, opened, compiled, {"send": opened.send.address}))


def open_reduce(core: Core, recv: Any, options: Options) -> ReduceStream:
    """Agree, and start a reduce-scatter step by step into `recv`."""
    opened = OpenReduce(core, recv, None, options)
    if opened.error is None and not arrays.describe(recv, "recv").contiguous:
        opened.error = ArgumentError(f"recv must be contiguous, got a strided array of shape {opened.send.shape}")
    compiled = core.engine.run(opened)
    return ReduceStream(_Driver(core, opened, compiled, {"recv": opened.send.address}))
