"""Opening a stream of steps: an operation like any other, with its agreement, and with a plan at the end of it."""

from __future__ import annotations

from typing import Any

from tasp_coll import arrays, gpu_calls
from tasp_coll.agreement import Header
from tasp_coll.core import SLOTS, Arena, Core, Shape
from tasp_coll.device import OnGpu
from tasp_coll.errors import ArgumentError, ArgumentTypeError
from tasp_coll.executor import Program
from tasp_coll.forecast import Choice, choice_of
from tasp_coll.gpu_steps import GpuDriver, StepPlan
from tasp_coll.operations import Collective, Steps
from tasp_coll.options import Call, Options
from tasp_coll.reduce_programs import reduce_steps_program
from tasp_coll.reduction import reduction
from tasp_coll.schedule import Schedule
from tasp_coll.slabs import accumulate_steps_program, gather_steps_program
from tasp_coll.tuning import stepwise

_ALL_SLOTS = (1 << SLOTS) - 2  # slot 0 is for calls
REVERSE, ACCUMULATE = "reverse", "accumulate"  # what else all ranks must agree on
_IN_WORDS = {REVERSE: " in reverse", ACCUMULATE: " with accumulate=True"}


class Opening(Collective):
    """Opens a stream: agreement on the call, rows of each rank, a free slot, and the compiled plan."""

    donate = False
    ahead = 0  # how many steps beyond the one that the caller is done with may be launched
    region = ""  # of the caller's array

    def key(self) -> tuple[Any, ...]:
        return Shape.of(self.send.shape).rest, self.send.dtype

    def describe(self) -> Call:
        return Call.of(
            call=self.name,
            row_shape=list(Shape.of(self.send.shape).rest),
            dtype=self.send.dtype,
            algorithm=self.options.label,
            rings=None if self.options.rings is None else int(self.options.rings),
            **self.options.grain._asdict(),
            **({self.options.extra: self.options.extra} if self.options.extra else {}),
        )

    def prepare(self, recv: Any) -> None:
        if self.options.algorithm not in self.algorithms():
            raise ArgumentError(
                f"algorithm must be one of {', '.join(self.algorithms())} to go step by step"
                f"{_IN_WORDS.get(self.options.extra, '')}, got {self.options.label!r}"
            )
        if self.gpu is not None and self.gpu.capturing:
            raise ArgumentError(f"{self.name} cannot be captured in a CUDA graph, got a stream that is capturing")
        if not self.send.shape:
            raise ArgumentError("an axis 0 is needed to go by rows, got a 0-d array")
        self._shape = Shape.of(self.send.shape)
        self.row_elements = self._shape.row_elements
        self.rows: tuple[int, ...] = ()
        self.donated: tuple[bool, ...] = ()

    def algorithms(self) -> tuple[str, ...]:
        """Those that can go step by step. Only rings and slices have a mirror image in step with them."""
        return ("auto", "rings", "ring", "direct")

    def header(self) -> Header:
        if self.error is not None:
            return super().header()
        free = _ALL_SLOTS & ~sum(1 << slot for slot in self.core.streams)
        return Header(self.call.signature, rows=self._shape.rows, room=free, place=int(self.donate))

    def sizes(self) -> tuple[int, ...]:
        return tuple(rows * self.row_elements * self.send.itemsize for rows in self.rows)

    def run(self) -> Steps:
        yield from self.agree()
        headers = self.core.rounds.headers()
        self.rows = tuple(header.rows for header in headers)
        self.donated = tuple(header.place == 1 for header in headers)
        # A slot that is free on every rank: ranks may be done with earlier streams at different times.
        free = _ALL_SLOTS
        for header in headers:
            free &= header.room
        if not free:
            raise ArgumentError(f"{self.name}: {SLOTS - 1} streams of steps are open already, close one first")
        self.slot = (free & -free).bit_length() - 1
        yield from self.settle()
        self.chosen = self.choose()
        if self.gpu is not None:
            return (yield from self._open_on_gpu(self.gpu))
        compiled = yield from self._compiled()
        self.core.streams.add(self.slot)
        return compiled

    def _open_on_gpu(self, gpu: OnGpu) -> Steps:
        """The driver, which gives its first launches now, in the order of the calls."""
        yield from gpu_calls.link_up(self, gpu)

        def make() -> StepPlan:
            (program,) = self.programs(self.schedule())
            return StepPlan.of(program, gpu.device)

        plan = yield from self.made(self.core.launches, self.compiled_key(), make)
        assert gpu.device.links is not None
        plan.prepare(gpu.device.links)
        return GpuDriver(self, plan)

    def choose(self) -> Choice:
        options, core = self.options, self.core
        name = options.named or stepwise(core.topology, self.algorithms())
        if name == "direct":
            return Choice(name)  # a slice from every peer at each step
        return choice_of(name, self.collective, core.size, max(self.sizes(), default=0), options.rings)

    def arena(self) -> Arena:
        return Arena()

    def compiled_key(self) -> tuple[Any, ...]:
        # What other ranks donate is nothing to this one, but all must find, or make, their plans together.
        return (*super().compiled_key(), self.slot, self.donated)

    def inline(self) -> bool:
        return False


class OpenGather(Opening):
    """Opens `allgather_steps`."""

    collective, name = "allgather", "allgather_steps"
    ahead, region = 1, "send"

    def __init__(self, core: Core, send: Any, options: Options, donate: bool) -> None:
        self.donate = donate
        super().__init__(core, send, None, options)

    def prepare(self, recv: Any) -> None:
        super().prepare(recv)
        if not self.donate:
            return
        given = arrays.describe(self.held, "send")
        if given.readonly:
            raise ArgumentTypeError(f"send must be writable to be donated, got a read-only {given.kind} array")
        if not given.contiguous:
            raise ArgumentError(f"send must be contiguous to be donated, got a strided array of shape {given.shape}")

    def algorithms(self) -> tuple[str, ...]:
        return super().algorithms() if self.options.extra else (*super().algorithms(), "hierarchical")

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        row_bytes = self.row_elements * self.send.itemsize
        grain = self.options.grain
        return (gather_steps_program(schedule, self.core.rank, self.rows, row_bytes, self.donate, grain),)

    def schedule(self) -> Schedule:
        assert self.chosen is not None
        return self.core.schedule(self.collective, self.chosen, reverse=bool(self.options.extra))


class OpenReduce(Opening):
    """Opens `reduce_scatter_steps`; its array is the one that receives the sums."""

    collective, name = "reduce_scatter", "reduce_scatter_steps"
    region = "recv"

    def prepare(self, recv: Any) -> None:
        super().prepare(recv)
        # Bytes travel, or numbers.
        self.how = None if self.accumulate else reduction("sum", self.send.dtype, self.core.size)
        if self.send.readonly:
            raise ArgumentTypeError(f"recv must be writable, got a read-only {self.send.kind} array")

    @property
    def accumulate(self) -> bool:
        """The caller adds up."""
        return self.options.extra == ACCUMULATE

    def algorithms(self) -> tuple[str, ...]:
        return ("auto", "rings", "ring") if self.accumulate else super().algorithms()

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        rank, rows, grain = self.core.rank, self.rows, self.options.grain
        if self.how is None:
            row_bytes = self.row_elements * self.send.itemsize
            return (accumulate_steps_program(schedule, rank, rows, row_bytes, grain),)
        return (reduce_steps_program(schedule, rank, rows, self.row_elements, self.how, grain),)
