"""The collectives as operations: look at the arguments, agree, move bytes, hand back the result.

Each class says what is particular to a collective: its shapes, how small payloads that came with the agreement are
put together, its programs, and the library's own call. What they share is in `Collective.run`.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tasp_coll import arrays
from tasp_coll.agreement import NOT_INLINE, Header, disagreement, encode
from tasp_coll.arrays import Buffer
from tasp_coll.core import Compiled, Core, Shape
from tasp_coll.errors import ArgumentError, ArgumentTypeError, CollectiveError, MismatchError
from tasp_coll.executor import Flow, Program
from tasp_coll.programs import ALIGN, all_to_all_program, gather_program, reduce_program
from tasp_coll.reduction import Reduction, reduction
from tasp_coll.schedule import Schedule, cut, uniform_weights
from tasp_coll.transport import NativeRequest
from tasp_coll.tuning import Choice, direct

ALGORITHMS = ("auto", "rings", "ring", "direct", "native")
_HALVES = ("bfloat16", "float16")
_FAILED = bytes(16)  # the signature of a rank whose own arguments are bad
_EXPLAIN = b"explain".ljust(16)
_READY = b"ready".ljust(16)
Steps = Generator[bool, None, Any]


@dataclass(frozen=True)
class Options:
    """What a caller may ask for beside the arrays."""

    algorithm: str | Schedule = "auto"
    rings: int | None = None
    op: str = "sum"
    counts: tuple[int, ...] | None = None
    extra: str = ""  # of streams: what else must be the same on all ranks

    def check(self, collective: str, core: Core) -> None:
        """ArgumentError for what cannot be meant."""
        if isinstance(self.algorithm, Schedule):
            if (self.algorithm.topology, self.algorithm.collective) != (core.topology, collective):
                raise ArgumentError(
                    f"algorithm must be a schedule for {collective} on {core.topology.name!r}, got one for "
                    f"{self.algorithm.collective} on {self.algorithm.topology.name!r}"
                )
            core.proved(self.algorithm)
        elif self.algorithm not in ALGORITHMS:
            raise ArgumentError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")
        if self.rings is None:
            return
        if self.algorithm not in ("auto", "rings"):
            raise ArgumentError(f"rings applies to algorithm 'rings' only, got rings={self.rings!r} with {self.algorithm!r}")
        core.schedule(collective, Choice("rings", self.rings))

    @property
    def label(self) -> str:
        """The algorithm as ranks compare it."""
        asked = self.algorithm
        return f"schedule {asked.fingerprint}" if isinstance(asked, Schedule) else str(asked)


@dataclass(frozen=True)
class Call:
    """What all ranks must agree on, and its signature."""

    described: tuple[tuple[str, object], ...]
    signature: bytes

    @classmethod
    def of(cls, **described: object) -> Call:
        """From what a rank passed."""
        pairs = tuple((key, value) for key, value in described.items() if value is not None)
        return cls(pairs, hashlib.blake2b(repr(pairs).encode(), digest_size=16).digest())


class Collective:
    """One call of a collective on this rank. Errors of its own arguments are kept, and told to all by `run`."""

    collective = ""
    name = ""
    slot = 0

    def __init__(self, core: Core, send: Any, recv: Any, options: Options) -> None:
        self.core, self.options = core, options
        self.error: CollectiveError | None = None
        self.flow: Flow | None = None
        self.out: Buffer | None = None
        self.given = recv
        self.chosen: Choice | None = None
        try:
            self.send = arrays.packed(arrays.describe(send, "send"))
            self.original = send
            self.call = self._known_call()
            self.prepare(recv)
        except CollectiveError as error:
            self.error = error

    # --- what a collective says of itself

    def key(self) -> tuple[Any, ...]:
        """What the agreed call depends on."""
        raise NotImplementedError

    def prepare(self, recv: Any) -> None:
        """Check `recv`, or make it."""
        raise NotImplementedError

    def sizes(self) -> tuple[int, ...]:
        """Bytes of each rank's shard."""
        raise NotImplementedError

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        """The programs, run one after another."""
        raise NotImplementedError

    def bases(self) -> Sequence[dict[str, int]]:
        """Where each program's memory is."""
        raise NotImplementedError

    def unpack(self) -> None:
        """Make the result from the payloads of the agreement."""
        raise NotImplementedError

    def own(self) -> None:
        """What this rank does for itself while messages travel."""

    def native(self) -> NativeRequest:
        """For the library's own collective."""
        raise NotImplementedError

    # --- what they share

    def _known_call(self) -> Call:
        """The call of these arguments, made once."""
        key = (self.name, self.key(), self.options)
        found = self.core.calls.get(key)
        if isinstance(found, Call):
            return found
        self.options.check(self.collective, self.core)
        call = self.describe()
        self.core.calls.put(key, call)
        return call

    def describe(self) -> Call:
        """What this rank passed, in words."""
        options = self.options
        return Call.of(
            call=self.name,
            shape=list(self.send.shape),
            dtype=self.send.dtype,
            algorithm=options.label,
            rings=options.rings,
            counts=None if options.counts is None else list(options.counts),
        )

    def header(self) -> Header:
        """What this rank says at the start."""
        if self.error is not None:
            return Header(_FAILED)
        return Header(self.call.signature, self.send.nbytes if self._fits() else NOT_INLINE)

    def _fits(self) -> bool:
        return self.options.rings is None and self.options.algorithm in ("auto", "direct") and (
            self.send.nbytes <= self.core.rounds.capacity
        )

    def inline(self) -> bool:
        """After the agreement: whether every payload came with it."""
        return self._fits()

    def run(self) -> Steps:
        """The collective, as the engine runs it."""
        yield from self.agree()
        if self.inline():
            self.unpack()
            self.chosen = direct(self.collective, self.core.size)
        else:
            self.chosen = self._choose()
            if self.chosen is not None and self.chosen.algorithm == "native":
                yield from self._run_native()
            else:
                compiled = yield from self._compiled()
                yield from self._run_programs(compiled)
        return self.result()

    def result(self) -> Any:
        """What the caller gets back."""
        return self.given if self.given is not None or self.out is None else arrays.result(self.out)

    def pending(self) -> tuple[set[int], int | None]:
        """Who is waited for; see `engine.Operation`."""
        return (self.core.rounds.pending(), None) if self.flow is None else self.flow.pending()

    def agree(self) -> Steps:
        """The round that begins every call: all go on, or all raise."""
        rounds = self.core.rounds
        header = self.header()
        rounds.post(header, self.send.address if header.payload > 0 else 0)
        while not rounds.poll():
            yield False
        if self.error is not None or not rounds.same(header.signature):
            yield from self._explain(header.signature)

    def _explain(self, signature: bytes) -> Steps:
        """Tell each other what was passed, and raise."""
        rounds = self.core.rounds
        if self.error is not None and rounds.same(signature):
            raise self.error
        described: dict[str, object] = {"call": self.name}
        if self.error is not None:
            described["error"] = f"{type(self.error).__name__}: {self.error}"
        else:
            described |= dict(self.call.described)
        text = encode(described, rounds.capacity)
        memory = ctypes.create_string_buffer(text, len(text))
        rounds.post(Header(_EXPLAIN, len(text)), ctypes.addressof(memory))
        while not rounds.poll():
            yield False
        raise disagreement([rounds.text(rank) for rank in range(rounds.size)]) from self.error

    def confirm(self) -> Steps:
        """After work of its own that may have failed on some rank: all go on, or all raise."""
        rounds = self.core.rounds
        signature = _READY if self.error is None else _FAILED
        rounds.post(Header(signature), 0)
        while not rounds.poll():
            yield False
        if self.error is not None or not rounds.same(_READY):
            yield from self._explain(signature)

    def _choose(self) -> Choice | None:
        """What runs; None for a user's schedule."""
        options, core = self.options, self.core
        if isinstance(options.algorithm, Schedule):
            return None
        if options.rings is not None or options.algorithm in ("rings", "ring"):
            return Choice("ring" if options.algorithm == "ring" else "rings", options.rings)
        if options.algorithm == "direct":
            return direct(self.collective, core.size)
        if options.algorithm == "native":
            return Choice("native")
        half = self.collective != "allgather" and self.send.dtype in _HALVES
        chosen = core.chooser.choose(core.situation, self.collective, max(self.sizes(), default=0), half)
        if chosen.algorithm == "native" and not core.transport.has_native(self.native()):
            return direct(self.collective, core.size)
        return chosen

    def _compiled(self) -> Generator[bool, None, Compiled]:
        """The compiled plan; a new one is made on all ranks before any of them goes on."""
        core, key = self.core, self.compiled_key()
        found = core.compiled.get(key)
        if found is not None:
            return found
        try:
            found = Compiled(core.transport, self.programs(self._schedule()), self.slot)
            core.compiled.put(key, found)
            core.planned += 1
        except (CollectiveError, MemoryError) as error:
            self.error = error if isinstance(error, CollectiveError) else CollectiveError(f"no memory: {error}")
        try:
            yield from self.confirm()
        except MismatchError:
            core.compiled.remove(key)
            raise
        assert found is not None
        return found

    def compiled_key(self) -> tuple[Any, ...]:
        """What a compiled plan depends on."""
        asked = self.options.label if self.chosen is None else self.chosen
        return self.call.signature, asked, self.sizes()

    def _schedule(self) -> Schedule:
        if isinstance(self.options.algorithm, Schedule):
            return self.options.algorithm
        assert self.chosen is not None
        return self.core.schedule(self.collective, self.chosen)

    def _run_programs(self, compiled: Compiled) -> Steps:
        for index, bases in enumerate(self.bases()):
            self.flow = Flow(compiled.exchange(index, bases))
            if index == 0:
                self.own()
            while not self.flow.done:
                yield self.flow.poll()

    def _run_native(self) -> Steps:
        wanted = self.native()
        if not self.core.transport.has_native(wanted):  # the same on all ranks
            raise ArgumentError(
                f"algorithm 'native': the {self.core.transport.name} transport has no {self.name} of its own for "
                f"dtype {self.send.dtype} and op {self.options.op!r}"
            )
        request = self.core.transport.native(wanted)
        while not request.test():
            yield False

    # --- helpers for `prepare`

    def receive(self, recv: Any, shape: tuple[int, ...], in_place: int | None) -> Buffer:
        """The caller's `recv`, checked, or a new result. in_place: offset in bytes at which `send` may lie in it."""
        if recv is None:
            return arrays.new(self.send, shape)
        out = arrays.describe(recv, "recv")
        if out.readonly:
            raise ArgumentTypeError(f"recv must be writable, got a read-only {out.kind} array")
        if not out.contiguous:
            raise ArgumentError(f"recv must be contiguous, got a strided array of shape {out.shape}")
        if out.dtype != self.send.dtype:
            raise ArgumentError(f"recv must have send's dtype {self.send.dtype}, got {out.dtype}")
        self.check_shape(out, shape)
        if arrays.overlap(self.send, out) and self.send.address != out.address + (in_place if in_place is not None else -1):
            raise ArgumentError(
                "recv must not overlap send, unless send is exactly this rank's own slice of it: they share memory"
            )
        return out

    def check_shape(self, out: Buffer, shape: tuple[int, ...]) -> None:
        """recv has the result's shape, or the stacked one with a leading axis of ranks, or is flat memory of that size."""
        stacked = (self.core.size, *self.send.shape)
        flat = out.kind in ("array", "bytearray", "memoryview", "buffer") and len(out.shape) == 1
        size = self.send.itemsize
        for extent in shape:
            size *= extent
        if out.shape == shape or (self.collective == "allgather" and out.shape == stacked) or (flat and out.nbytes == size):
            return
        raise ArgumentError(f"recv must have shape {shape}, got {out.shape}")


class AllGather(Collective):
    """Shards of one shape, rank-major."""

    collective, name = "allgather", "decomposed_allgather"

    def key(self) -> tuple[Any, ...]:
        return self.send.shape, self.send.dtype

    def prepare(self, recv: Any) -> None:
        rows, rest = Shape.of(self.send.shape)
        self.out = self.receive(recv, (self.core.size * rows, *rest), self.core.rank * self.send.nbytes)

    def sizes(self) -> tuple[int, ...]:
        return (self.send.nbytes,) * self.core.size

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        return (gather_program(schedule, self.core.rank, self.sizes()),)

    def bases(self) -> Sequence[dict[str, int]]:
        assert self.out is not None
        return ({"send": self.send.address, "recv": self.out.address},)

    def unpack(self) -> None:
        assert self.out is not None
        at, rounds = self.out.address, self.core.rounds
        for rank, nbytes in enumerate(self.sizes()):
            ctypes.memmove(at, rounds.payload(rank), nbytes)
            at += nbytes

    def own(self) -> None:
        assert self.out is not None
        place = self.out.address + sum(self.sizes()[: self.core.rank])
        if place != self.send.address:
            ctypes.memmove(place, self.send.address, self.send.nbytes)

    def native(self) -> NativeRequest:
        assert self.out is not None
        return NativeRequest(self.collective, self.send.address, self.out.address, self.sizes(), None, 1, None)


class AllGatherV(AllGather):
    """Shards whose number of rows differs."""

    name = "decomposed_allgatherv"

    def key(self) -> tuple[Any, ...]:
        return Shape.of(self.send.shape).rest, self.send.dtype, bool(self.send.shape)

    def describe(self) -> Call:
        rest = list(Shape.of(self.send.shape).rest)
        return Call.of(
            call=self.name,
            row_shape=rest,
            dtype=self.send.dtype,
            algorithm=self.options.label,
            rings=self.options.rings,
        )

    def prepare(self, recv: Any) -> None:
        if not self.send.shape:
            raise ArgumentError("send must have an axis 0 to be gathered along, got a 0-d array")
        self._rows, self._rest = Shape.of(self.send.shape)
        self._row_bytes = self.send.nbytes // self._rows if self._rows else self._row_size()
        self._counts: tuple[int, ...] = ()
        self._room = self._place = -1
        if recv is None:
            return
        out = arrays.describe(recv, "recv")
        self._room = out.nbytes // self._row_bytes if self._row_bytes else 0
        if arrays.overlap(self.send, out):
            offset = self.send.address - out.address
            self._place = offset // self._row_bytes if self._row_bytes and offset % self._row_bytes == 0 else -1
        shape = (out.shape[0] if out.shape and len(out.shape) == len(self.send.shape) else self._room, *self._rest)
        self.out = self.receive(recv, shape, self._place * self._row_bytes if self._place >= 0 else None)

    def _row_size(self) -> int:
        size = self.send.itemsize
        for extent in self._rest:
            size *= extent
        return size

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


class _Reducing(Collective):
    """What ReduceScatter and AllReduce share."""

    how: Reduction

    def key(self) -> tuple[Any, ...]:
        return self.send.shape, self.send.dtype, self.options.op

    def describe(self) -> Call:
        call = super().describe()
        return Call.of(**dict(call.described), op=self.options.op)

    def native(self) -> NativeRequest:
        assert self.out is not None
        address = self.send.address
        if self.collective == "reduce_scatter" and arrays.overlap(self.send, self.out):
            # MPI wants them apart.
            self._apart = ctypes.create_string_buffer(self.send.nbytes)
            address = ctypes.addressof(self._apart)
            ctypes.memmove(address, self.send.address, self.send.nbytes)
        how = self.how
        return NativeRequest(
            self.collective, address, self.out.address, self.counts(), how.dtype, how.itemsize, self.options.op
        )

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
        self._row_elements = 1
        for extent in rest:
            self._row_elements *= extent
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
        if len(counts) != size or sum(counts) != rows or min(counts) < 0:
            raise ArgumentError(f"counts must be {size} numbers >= 0 that add up to send's {rows} rows, got {counts}")
        return counts

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
        return tuple(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))

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

    def _choose(self) -> Choice:
        return Choice("direct")

    def programs(self, schedule: Schedule) -> tuple[Program, ...]:
        return (all_to_all_program(schedule, self.core.rank, self._block),)

    def bases(self) -> Sequence[dict[str, int]]:
        assert self.out is not None
        return ({"send": self.send.address, "recv": self.out.address},)

    def own(self) -> None:
        self._place(self.core.rank, self.send.address)

    def unpack(self) -> None:
        for rank in range(self.core.size):
            self._place(rank, self.core.rounds.payload(rank))

    def _place(self, rank: int, address: int) -> None:
        """Put this rank's block of the array at `address`, which `rank` sent, where it belongs."""
        assert self.out is not None
        ctypes.memmove(self.out.address + rank * self._block, address + self.core.rank * self._block, self._block)
