"""A collective call whose arrays are on a GPU: everything is given to a stream, and the GPU does it in its own time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, Protocol, TypeVar

from tasp_coll.arrays import Buffer
from tasp_coll.core import Cache, Core
from tasp_coll.device import OnGpu
from tasp_coll.errors import ArgumentError
from tasp_coll.executor import Program
from tasp_coll.forecast import Choice
from tasp_coll.launches import Launch, launches
from tasp_coll.linkup import LinkUp
from tasp_coll.schedule import Schedule
from tasp_coll.transport.nccl import load

Steps = Generator[bool, None, Any]
V = TypeVar("V")


class GpuCall(Protocol):
    """What a collective call says of itself; `operations.Collective` documents each."""

    core: Core
    collective: str
    name: str
    phase: str
    send: Buffer
    out: Buffer | None
    given: Any
    held: Any
    chosen: Choice | None
    linking: LinkUp | None

    def choose(self) -> Choice | None: ...
    def schedule(self) -> Schedule: ...
    def programs(self, schedule: Schedule) -> tuple[Program, ...]: ...
    def bases(self) -> Sequence[dict[str, int]]: ...
    def own(self) -> list[tuple[int, int, int]]: ...
    def sizes(self) -> tuple[int, ...]: ...
    def compiled_key(self) -> tuple[Any, ...]: ...
    def made(self, cache: Cache[Hashable, V], key: Hashable, make: Callable[[], V]) -> Generator[bool, None, V]: ...


def run(call: GpuCall, gpu: OnGpu) -> Steps:
    """After the agreement: link up at the first call, and give everything to the stream."""
    device, guard = call.core.gpu(gpu.device.number)
    if device.links is None:
        yield from link_up(call, gpu)
    gpu.begin()
    call.chosen = call.chosen or call.choose()
    if call.chosen is not None and call.chosen.algorithm == "native":
        _give_native(call, gpu)
    else:
        given = yield from _launches(call)
        for (steps, stage_bytes), bases in zip(given, call.bases(), strict=True):
            device.run(steps, bases, stage_bytes, gpu.stream)
    device.copy(call.own(), gpu.stream)
    guard.watch(gpu.end(call.name, call.held, call.send, call.given, call.out))


def link_up(call: GpuCall, gpu: OnGpu) -> Steps:
    """The first call on GPUs links them."""
    call.linking = LinkUp(call.core.rounds, load(), gpu.device)
    running = call.linking.run()
    while True:
        try:
            moved = next(running)
        except StopIteration:
            break
        call.phase = call.linking.phase
        yield moved
    call.linking = None


def has_native(call: GpuCall) -> bool:
    """Whether NCCL has a collective of its own for it."""
    return call.collective == "allgather" and len(set(call.sizes())) == 1


def _give_native(call: GpuCall, gpu: OnGpu) -> None:
    if not has_native(call):
        raise ArgumentError(f"algorithm 'native': on GPUs there is only an allgather of equal shards, no {call.name}")
    assert call.out is not None
    assert gpu.device.links is not None
    gpu.device.links.allgather(call.send.address, call.out.address, call.send.nbytes, gpu.stream.ptr)


def _launches(call: GpuCall) -> Generator[bool, None, tuple[tuple[tuple[Launch, ...], int], ...]]:
    """Launches and staging bytes of each program."""

    def make() -> tuple[tuple[tuple[Launch, ...], int], ...]:
        programs = call.programs(call.schedule())
        return tuple((launches(program), program.stage_bytes) for program in programs)

    return (yield from call.made(call.core.launches, call.compiled_key(), make))
