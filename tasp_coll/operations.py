"""A collective call as an operation: look at the arguments, agree, move bytes, hand back the result."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tasp_coll import arrays, checksums, gpu_calls
from tasp_coll.agreement import NOT_INLINE, Header, disagreement, encode, inline_bytes
from tasp_coll.arrays import Buffer, memory_at
from tasp_coll.core import Arena, Cache, Compiled, Core
from tasp_coll.device import OnGpu
from tasp_coll.errors import ArgumentError, ArgumentTypeError, CollectiveError, MismatchError
from tasp_coll.executor import Flow, Program
from tasp_coll.forecast import Choice, choice_of, direct
from tasp_coll.linkup import LinkUp
from tasp_coll.options import Call, Options
from tasp_coll.peer_reads import CLOSING, MOVING, PeerReads
from tasp_coll.reading import Reading
from tasp_coll.schedule import Schedule
from tasp_coll.transport import NativeRequest
from tasp_coll.tuning import rule

_HALVES = ("bfloat16", "float16")
_FAILED = bytes(16)  # the signature of a rank whose own arguments are bad
_EXPLAIN = b"explain".ljust(16)
_READY = b"ready".ljust(16)
_INTACT, _SPOILT = b"intact".ljust(16), b"spoilt".ljust(16)
_AGREEING, _COMPARING = "agreeing on the call", "comparing checksums"
_QUICK_POLLS = 32
Steps = Generator[bool, None, Any]
V = TypeVar("V")


class Collective:
    """One call of a collective on this rank. Errors of its own arguments are kept, and told to all by `run`."""

    collective = ""
    name = ""
    slot = 0
    repeatable = True  # can be run again with the same arrays
    gpu: OnGpu | None = None
    linking: LinkUp | None = None

    def __init__(self, core: Core, send: Any, recv: Any, options: Options) -> None:
        self.core, self.options = core, options
        self.error: CollectiveError | None = None
        self.flow: Flow | Reading | None = None
        self.phase = _AGREEING
        self.out: Buffer | None = None
        self.given, self.held = recv, send
        self.chosen: Choice | None = None
        self._greeting: tuple[bytes, memoryview | bytes] | None = None
        self._small = self._posted = False
        self._reads = PeerReads()
        try:
            self.send = arrays.packed(arrays.describe(send, "send"))
            if self.send.device is not None:
                if core.checksums:
                    raise ArgumentTypeError(f"{checksums.ENVIRONMENT}=1 is for host memory, got an array on a GPU")
                self.gpu = OnGpu(core.gpu(self.send.device)[0], self.send.kind)
            self.call = self._known_call()
            self.prepare(recv)
        except CollectiveError as error:
            self.error = error
        except Exception as error:  # the others must not be left waiting, whatever it is
            self.error = ArgumentError(f"{type(error).__name__}: {error}")
            self.error.__cause__ = error

    def again(self, send: Any, recv: Any) -> None:
        """Get ready to run once more with the arrays that it was made for."""
        self.given, self.flow, self.phase = recv, None, _AGREEING
        self.held = send  # alive as long as messages may read it
        if recv is None:
            assert self.out is not None
            self.out = arrays.new(self.send._replace(owner=send), self.out.shape)

    def let_go(self) -> None:
        """After a run: keep no array alive."""
        self.given = self.held = None
        if self.out is not None and self.out.owner is not None:
            self.out = self.out._replace(owner=None)

    def forget(self) -> None:
        """Let go of the caller's arrays."""
        self.let_go()
        self.send = self.send._replace(owner=None)

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

    def own(self) -> list[tuple[int, int, int]]:
        """What this rank copies for itself, (to, from, bytes)."""
        return []

    def own_first(self) -> bool:
        """Whether that is copied before there are messages, which are then sent from the copy, as `bases` has it.

        Else it comes last: messages want the core and its caches first.
        """
        return False

    def reads(self) -> bool:
        """Whether ranks read each other's shards in their memory, in place of messages."""
        return False

    def home(self) -> int:
        """Address of this rank's shard in the result, where the others read it."""
        raise NotImplementedError

    def native(self) -> NativeRequest:
        """For the library's own collective."""
        raise NotImplementedError

    def apart(self, request: NativeRequest) -> NativeRequest:
        """The request, with memory as the library wants it."""
        return request

    # --- what they share

    def _known_call(self) -> Call:
        """The call of these arguments, made once."""
        self.options.check_types(self.core.size)
        where = "" if self.gpu is None else "GPU, captured" if self.gpu.capturing else "GPU"
        key = (self.name, self.key(), self.options, type(self.options.rings), where)
        found = self.core.calls.get(key)
        if isinstance(found, Call):
            return found
        self.options.check(self.collective, self.core)
        call = self.describe()
        if where:
            call = Call.of(**dict(call.described), where=where)
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
            rings=None if options.rings is None else int(options.rings),
            counts=options.counts,
        )

    def header(self) -> Header:
        """What this rank says at the start."""
        if self.error is not None:
            return Header(_FAILED)
        if self.gpu is not None and self.repeatable and not self.gpu.capturing:
            nbytes = max(self.send.nbytes, 0 if self.out is None else self.out.nbytes)
            return Header(self.call.signature, place=self.core.graphs.ready(self.graph_key(), nbytes))
        return Header(self.call.signature, self.send.nbytes if self._fits() else NOT_INLINE)

    def graph_key(self) -> Hashable:
        """What a CUDA graph of this call depends on."""
        return self.call.signature, self.send.address, 0 if self.out is None else self.out.address

    def _fits(self) -> bool:
        return (
            self.gpu is None
            and not self.core.checksums
            and self.options.rings is None
            and self.options.algorithm in ("auto", "direct")
            and self.send.nbytes <= self.most()
        )

    def most(self) -> int:
        """Bytes of the largest payload that comes with the agreement."""
        return inline_bytes(self.core.size)

    def inline(self) -> bool:
        """After the agreement: whether every payload came with it."""
        return self._fits()

    def quick(self) -> bool:
        """A call of a kind that needs rounds alone, made before; unfinished, it is left to `run`."""
        if not (self._small or self._reads.known):
            return False
        core = self.core
        core.rounds.post(*(self._greeting or self._greet()))
        self._posted = True
        if not self.heard(self.call.signature):
            return False
        self._posted = False
        if self._small:
            self.unpack()
        elif not self._reads.quick(self):
            return False
        core.last_choice = self.chosen
        return True

    def heard(self, signature: bytes) -> bool:
        """Whether all say so at once, or almost."""
        rounds, pause = self.core.rounds, self.core.transport.pause
        for _ in range(_QUICK_POLLS):
            if rounds.poll():
                return rounds.same(signature)
            pause(1)
        return False

    def run(self) -> Steps:
        """The collective, as the engine runs it."""
        if not self._reads.begun:  # by `quick`, after the agreement
            yield from self.agree()
        if self.gpu is not None:
            yield from gpu_calls.run(self, self.gpu)
        elif self.inline():
            self.unpack()
            self.chosen = self.chosen or direct(self.collective, self.core.size)
            self._small = self.repeatable and self.core.healer is None
        else:
            self.chosen = self.chosen or self.choose()
            if self.chosen is not None and self.chosen.algorithm == "native":
                yield from self._run_native()
            elif not (self.reads() and (yield from self._reads.run(self))):
                yield from self._run_programs()
        self.core.last_choice = self.chosen
        yield from self.settle()
        return self.result()

    def settle(self) -> Steps:
        """Where links heal: agree on what was seen of them. No rank leaves before all have what they came for."""
        if self.core.healer is not None:
            self.phase = CLOSING
            yield from self.core.healer.settle()

    def result(self) -> Any:
        """What the caller gets back."""
        if self.given is not None or self.out is None:
            return self.given
        if self.gpu is not None:
            with self.gpu.device.on(self.gpu.stream):  # what a framework reads of it later comes after that stream
                return arrays.result(self.out)
        return arrays.result(self.out)

    def pending(self) -> tuple[set[int], int | None]:
        """Who is waited for; see `work.Operation`."""
        if self.flow is not None and self.phase == MOVING:
            return self.flow.pending()
        if self.linking is not None:
            return self.linking.pending()
        return self.core.rounds.pending(), None

    def agree(self) -> Steps:
        """The round that begins every call: all go on, or all raise."""
        rounds = self.core.rounds
        if not self._posted:
            rounds.post(*self._greet())
        self._posted = False
        while not rounds.poll():
            yield False
        if self.error is not None or not rounds.same(self.call.signature):
            yield from self._explain()

    def _greet(self) -> tuple[bytes, memoryview | bytes]:
        """The packed header, and the payload."""
        if self._greeting is None:
            header = self.header()
            nbytes = max(header.payload, 0)
            self._greeting = header.packed(), memory_at(self.send.address, nbytes).data if nbytes else b""
        return self._greeting

    def _explain(self) -> Steps:
        """Tell each other what was passed, and raise."""
        rounds = self.core.rounds
        if self.error is not None and rounds.same(_FAILED):
            raise self.error
        described: dict[str, object] = {"call": self.name}
        if self.error is not None:
            described["error"] = f"{type(self.error).__name__}: {self.error}"
        else:
            described |= dict(self.call.described)
        text = encode(described, rounds.capacity)
        rounds.post(Header(_EXPLAIN, len(text)).packed(), text)
        while not rounds.poll():
            yield False
        raise disagreement([rounds.text(rank) for rank in range(rounds.size)]) from self.error

    def confirm(self) -> Steps:
        """After work of its own that may have failed on some rank: all go on, or all raise."""
        rounds = self.core.rounds
        rounds.post(Header(_READY if self.error is None else _FAILED).packed())
        while not rounds.poll():
            yield False
        if self.error is not None or not rounds.same(_READY):
            yield from self._explain()

    def choose(self) -> Choice | None:
        """What runs; None for a user's schedule."""
        options, core = self.options, self.core
        if isinstance(options.algorithm, Schedule):
            return None
        size = max(self.sizes(), default=0)
        if options.named is not None:
            return choice_of(options.named, self.collective, core.size, size, options.rings)
        half = self.collective != "allgather" and self.send.dtype in _HALVES
        if self.gpu is not None:
            situation = replace(core.situation, native=gpu_calls.has_native(self), shared=False)
            return rule(situation, self.collective, size, half, core.chooser.costs)
        chosen = core.chooser.choose(core.situation, self.collective, size, half)
        if chosen.algorithm == "native" and (core.checksums or not core.transport.has_native(self.native())):
            return rule(replace(core.situation, native=False), self.collective, size, half, core.chooser.costs)
        return chosen

    def _compiled(self) -> Generator[bool, None, Compiled]:
        """The compiled plan."""

        def make() -> Compiled:
            programs = self.programs(self.schedule())
            if self.core.checksums:
                programs = tuple(checksums.checked(program, self.core.rank) for program in programs)
            return Compiled(self.core.transport, programs, self.arena(), self.slot)

        return (yield from self.made(self.core.compiled, self.compiled_key(), make))

    def made(self, cache: Cache[Hashable, V], key: Hashable, make: Callable[[], V]) -> Generator[bool, None, V]:
        """What is kept for this call; if it is new, it is made on all ranks before any of them goes on."""
        found = cache.get(key)
        if found is not None:
            return found
        try:
            found = make()
            cache.put(key, found)
            self.core.planned += 1
        except (CollectiveError, MemoryError) as error:
            self.error = error if isinstance(error, CollectiveError) else CollectiveError(f"no memory: {error}")
        try:
            yield from self.confirm()
        except MismatchError:
            cache.remove(key)
            raise
        assert found is not None
        return found

    def arena(self) -> Arena:
        """Where its programs stage."""
        return self.core.arena

    def compiled_key(self) -> tuple[Any, ...]:
        """What a compiled plan depends on."""
        asked = self.options.label if self.chosen is None else self.chosen
        return self.call.signature, asked, self.sizes()

    def schedule(self) -> Schedule:
        if isinstance(self.options.algorithm, Schedule):
            return self.options.algorithm
        assert self.chosen is not None
        return self.core.schedule(self.collective, self.chosen)

    def _run_programs(self) -> Steps:
        compiled = yield from self._compiled()
        self.phase = MOVING
        faults: list[tuple[int, ...]] = []
        if early := self.own_first():
            self.copy_own()
        for index, bases in enumerate(self.bases()):
            self.flow = flow = Flow(compiled.exchange(index, bases))
            while not flow.done:
                yield flow.poll()
            faults += [(index, *fault) for fault in flow.exchange.faults]
        if not early:
            self.copy_own()
        if self.core.checksums:
            yield from self._compare(faults)

    def copy_own(self) -> None:
        """What is its own of the result."""
        for dst, src, nbytes in self.own():
            ctypes.memmove(dst, src, nbytes)

    def _compare(self, faults: Sequence[tuple[int, ...]]) -> Steps:
        """After all data has moved: all go on, or all raise what one of them found."""
        self.phase = _COMPARING
        rounds, text = self.core.rounds, checksums.encode(faults)
        rounds.post(Header(_SPOILT if faults else _INTACT, len(text)).packed(), text)
        while not rounds.poll():
            yield False
        if not rounds.same(_INTACT):
            raise checksums.corruption(self.name, [rounds.text(rank) for rank in range(rounds.size)])

    # --- on a GPU

    def aside(self) -> None:
        """The caller goes on while this runs."""
        if self.gpu is not None and self.error is None:
            self.gpu.aside()

    def hand_over(self) -> None:
        """In the thread of the caller who has waited."""
        if self.gpu is not None:
            self.gpu.hand_over()

    def _run_native(self) -> Steps:
        if self.core.checksums:
            raise ArgumentError(f"algorithm 'native' cannot be checked: {checksums.ENVIRONMENT} is 1")
        wanted = self.native()
        if not self.core.transport.has_native(wanted):  # the same on all ranks
            raise ArgumentError(
                f"algorithm 'native': the {self.core.transport.name} transport has no {self.name} of its own for "
                f"dtype {self.send.dtype} and op {self.options.op!r}"
            )
        self.phase = f"in the {self.core.transport.name} library's own collective"
        request = self.core.transport.native(self.apart(wanted))
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
        if out.device != self.send.device:
            where = [_where(buffer.device) for buffer in (self.send, out)]
            raise ArgumentError(f"recv must be where send is, {where[0]}, got one {where[1]}")
        if out.dtype != self.send.dtype:
            raise ArgumentError(f"recv must have send's dtype {self.send.dtype}, got {out.dtype}")
        self.check_shape(out, shape)
        apart = in_place is None or self.send.address != out.address + in_place
        if apart and arrays.overlap(self.send, out):
            raise ArgumentError(
                "recv must not overlap send, unless send is exactly this rank's own slice of it: they share memory"
            )
        return out

    def check_shape(self, out: Buffer, shape: tuple[int, ...]) -> None:
        """recv has the result's shape, or the stacked one (n, *shape), or is flat memory of that size."""
        stacked = (self.core.size, *self.send.shape)
        flat = out.kind in ("array", "bytearray", "memoryview", "buffer") and len(out.shape) == 1
        size = self.send.itemsize
        for extent in shape:
            size *= extent
        if (
            out.shape == shape
            or (self.collective == "allgather" and out.shape == stacked)
            or (flat and out.nbytes == size)
        ):
            return
        raise ArgumentError(f"recv must have shape {shape}, got {out.shape}")


def _where(device: int | None) -> str:
    return "in host memory" if device is None else f"on GPU {device}"
