"""A collective call whose arrays are on a GPU: everything is given to a stream, and the GPU does it in its own time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, Protocol, TypeVar

from tasp_coll import arrays
from tasp_coll.arrays import Buffer
from tasp_coll.core import Cache, Core
from tasp_coll.device import OnGpu
from tasp_coll.errors import ArgumentError
from tasp_coll.executor import Program
from tasp_coll.forecast import Choice
from tasp_coll.gpu_graphs import launch
from tasp_coll.guard import Pending
from tasp_coll.launches import Launch, launches
from tasp_coll.linkup import LinkUp
from tasp_coll.schedule import Schedule
from tasp_coll.transport.nccl import NcclLinks

Steps = Generator[bool, None, Any]
Given = tuple[tuple[tuple[Launch, ...], int], ...]  # of each program its launches and staging bytes
V = TypeVar("V")


class GpuCall(Protocol):
    """What a collective call says of itself; `operations.Collective` documents each."""

    core: Core
    gpu: OnGpu | None
    collective: str
    name: str
    phase: str
    repeatable: bool
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
    def graph_key(self) -> Hashable: ...
    def made(self, cache: Cache[Hashable, V], key: Hashable, make: Callable[[], V]) -> Generator[bool, None, V]: ...


def run(call: GpuCall, gpu: OnGpu) -> Steps:
    """After the agreement: link up at the first call, and give everything to the stream."""
    yield from link_up(call, gpu)
    call.chosen = call.chosen or call.choose()
    if call.chosen is not None and call.chosen.algorithm == "native":
        give = _native(call, gpu)
    else:
        give = _scheduled(call, gpu, (yield from _launches(call)))
    device, guard = call.core.gpu(gpu.device.number)
    if gpu.capturing:
        with device.captured() as held:
            give(gpu.stream, lambda nbytes: _held(device.memory(nbytes, gpu.stream), held))
        if gpu.beside:
            gpu.end()
            held.append((call.held, call.given, call.out))
        return
    device.follow(gpu.stream)
    began = device.event(gpu.stream)
    if not (call.repeatable and (yield from launch(call.core, gpu, call.graph_key(), give))):
        give(gpu.stream, lambda nbytes: device.staged(nbytes, gpu.stream))
    guard.watch(Pending(call.name, began, gpu.end(), _keep(call, gpu)))


def _held(memory: arrays.DeviceBytes, held: list[Any]) -> int:
    held.append(memory)
    return memory.address


def _keep(call: GpuCall, gpu: OnGpu) -> Any:
    """What must stay alive until the GPU is done. On the caller's own stream its allocator knows what is free when."""
    if not gpu.beside and arrays.follows(call.send):
        return None
    buffers = [buffer for buffer in (call.send, call.out) if buffer is not None and buffer.owner is not None]
    told = [arrays.crosses(buffer, gpu.stream.ptr) for buffer in buffers]
    return None if all(told) else (call.held, call.given, *buffers)


def link_up(call: GpuCall, gpu: OnGpu) -> Steps:
    """The first call on GPUs links them."""
    if gpu.device.links is not None:
        return
    if gpu.capturing:  # the same on all ranks, as the agreement says
        raise ArgumentError(
            f"{call.name}: the first call with an array on a GPU links the ranks, which cannot be captured: call it "
            "once before"
        )
    call.linking = LinkUp(call.core.rounds, gpu.device, call.core.gpu_transport, call.core.engine.timeout)
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
    links = None if call.gpu is None else call.gpu.device.links
    return links is not None and links.has_allgather and _equal_shards(call)


def _equal_shards(call: GpuCall) -> bool:
    return call.collective == "allgather" and len(set(call.sizes())) == 1


Give = Callable[[Any, Callable[[int], int]], None]  # to a stream, with a function that makes staging memory


def _native(call: GpuCall, gpu: OnGpu) -> Give:
    links = gpu.device.links
    if not _equal_shards(call):
        raise ArgumentError(f"algorithm 'native': on GPUs there is only an allgather of equal shards, no {call.name}")
    if not isinstance(links, NcclLinks):
        raise ArgumentError("algorithm 'native': CUDA IPC, by which these ranks are linked, has no collectives")
    assert call.out is not None
    send, recv, nbytes = call.send.address, call.out.address, call.send.nbytes

    def give(stream: Any, stage: Callable[[int], int]) -> None:
        with gpu.device.giving():
            links.allgather(send, recv, nbytes, stream.ptr)
        gpu.device.copy(call.own(), stream)

    return give


def _scheduled(call: GpuCall, gpu: OnGpu, given: Given) -> Give:
    def give(stream: Any, stage: Callable[[int], int]) -> None:
        for (steps, stage_bytes), bases in zip(given, call.bases(), strict=True):
            gpu.device.run(steps, {**bases, "stage": stage(stage_bytes)}, stream)
        gpu.device.copy(call.own(), stream)

    return give


def _launches(call: GpuCall) -> Generator[bool, None, Given]:
    """Launches, as the links want them, and staging bytes of each program."""

    def make() -> Given:
        programs = call.programs(call.schedule())
        return tuple((launches(program), program.stage_bytes) for program in programs)

    cache, key = call.core.launches, call.compiled_key()
    found: Given | None = cache.get(key)
    if found is None:
        made = yield from call.made(cache, key, make)
        links = None if call.gpu is None else call.gpu.device.links
        assert links is not None
        # Ranks do this together, so none may have failed before.
        found = cache.put(key, tuple((links.prepare(steps), stage_bytes) for steps, stage_bytes in made))
    return found
