"""Steps on a GPU: launches on a stream beside the caller's, and events where the two wait for each other.

What the caller's stream was given when it asks for a step comes before the memory of the step before is used again;
what it is given afterwards comes after that step's arrival. The host waits for neither. A step's launch is given when
the caller asks for a step, in the order of its calls, and never earlier: so all ranks give all launches, of several
streams of steps and of calls between them, in one order.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from tasp_coll import arrays
from tasp_coll.arrays import Buffer, DeviceBytes
from tasp_coll.core import Core
from tasp_coll.device import Device, OnGpu
from tasp_coll.executor import Program
from tasp_coll.guard import Pending
from tasp_coll.launches import Launch, Links, launches

Gate = tuple[str, int]  # "release" or "fill", and the step


@dataclass
class StepPlan:
    """A program of steps and its staging memory. idle: the event from which on nobody uses that, None: from now."""

    program: Program
    launches: tuple[Launch, ...]
    stage: DeviceBytes
    idle: Any = None
    prepared: bool = False

    @classmethod
    def of(cls, program: Program, device: Device) -> StepPlan:
        """With memory for the stream that its launches are given to."""
        return cls(program, launches(program), device.memory(program.stage_bytes, device.side_stream()))

    def prepare(self, links: Links) -> None:
        """Make the launches what the links want, at the first time: collective, as all ranks plan alike."""
        if not self.prepared:
            self.launches, self.prepared = links.prepare(self.launches), True


class Opened(Protocol):
    """What the opening operation knows; `openings.Opening`."""

    core: Core
    name: str
    phase: str
    send: Buffer
    slot: int
    ahead: int
    region: str
    gpu: OnGpu | None

    def quick(self) -> bool: ...
    def result(self) -> Any: ...
    def run(self) -> Any: ...
    def pending(self) -> tuple[set[int], int | None]: ...
    def hand_over(self) -> None: ...


class GpuDriver:
    """An open stream of steps; see `streams.Driver`. Making one gives the first launches."""

    def __init__(self, opened: Opened, plan: StepPlan) -> None:
        assert opened.gpu is not None
        self.core, self.opened, self.ended = opened.core, opened, False
        self._plan, self._gpu, self._device = plan, opened.gpu, opened.gpu.device
        self._caller, self._side = self._gpu.stream, self._device.side_stream()
        self._places = {opened.region: opened.send.address, "stage": plan.stage.address}
        self._open: dict[object, Any] = {}  # gates, and the events after which they are
        self._reached: dict[object, Any] = {}  # marks, likewise
        self._left = deque(plan.launches)
        self.core.streams.add(opened.slot)
        self.core.gpu_streams.append(self)
        arrays.crosses(opened.send, self._side.ptr)
        self._side.wait_event(self._device.event(self._caller))
        if plan.idle is not None:  # perhaps another stream of the caller's
            self._caller.wait_event(plan.idle)
        self._give(opened.ahead - 1)

    @property
    def program(self) -> Program:
        """What it runs."""
        return self._plan.program

    @property
    def memory(self) -> DeviceBytes:
        """Where it stages."""
        return self._plan.stage

    def open(self, gate: Gate) -> None:
        """The caller's stream has been given all that it wants to do with the step."""
        engine = self.core.engine
        engine.check()
        engine.settle(self.opened)
        self._caller = self._gpu.current()
        self._open[gate] = self._device.event(self._caller)
        self._give(gate[1] + self.opened.ahead)

    def reach(self, step: int) -> None:
        """What the caller's stream is given from now on comes after the step is there."""
        self.core.engine.check()
        self._caller = self._gpu.current()
        for mark in (("arrived", step), ("free", step)):
            event = self._reached.pop(mark, None)
            if event is not None:
                self._caller.wait_event(event)

    def times(self, step: int) -> tuple[None, None]:
        """Nobody on the host knows."""
        return None, None

    def looking(self) -> AbstractContextManager[None]:
        """On the caller's stream, as some kinds of array are copies."""
        return self._device.on(self._caller)

    def check(self) -> None:
        """What goes wrong, the guard says; checksums are for host memory."""

    def finish(self) -> None:
        """Give all that is left, with what is there."""
        if not self.ended:
            self._caller = self._gpu.current()
            self.drop()

    def drop(self) -> None:
        """The same, for the garbage collector: in any thread, at any time."""
        if not self.ended:
            self.ended = True
            self._device.later(self._drain)

    def _drain(self) -> None:
        engine, device = self.core.engine, self._device
        try:
            if engine.usable and device.links is not None and not device.links.broken:
                if not engine.inside:
                    engine.settle(self.opened)
                now = device.event(self._caller)
                self._open |= {gate: now for gate in self.program.gates if gate not in self._open}
                self._give(math.inf)
                self._side.wait_event(now)
                self._plan.idle = device.event(self._side)
                self._caller.wait_event(self._plan.idle)
                if not arrays.follows(self.opened.send):
                    _, guard = self.core.gpu(device.number)
                    guard.watch(Pending(self.opened.name, now, self._plan.idle, self.opened))
        finally:
            self.core.streams.discard(self.opened.slot)
            self.core.gpu_streams.remove(self)

    def _give(self, until: float) -> None:
        """The launches of all steps until then."""
        device, guard = self.core.gpu(self._device.number)
        try:
            with device.giving():
                while self._left and self._left[0].step <= until:
                    launch = self._left.popleft()
                    for gate in launch.gates:
                        self._side.wait_event(self._open[gate])
                    device.follow(self._side)
                    began = device.event(self._side)
                    device.run((launch,), self._places, self._side)
                    ended = device.passed(self._side)
                    self._reached |= dict.fromkeys(launch.marks, ended)
                    guard.watch(Pending(f"{self.opened.name}, step {launch.step}", began, ended))
        except Exception as error:
            raise self.core.engine.judge(error, self.opened) from error
