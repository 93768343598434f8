"""A loopback world that writes down what its transports are asked for. Messages travel as ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasp_coll.core import SLOTS
from tasp_coll.transport import Op
from tasp_coll.transport.loopback import LoopbackTransport, LoopbackWorld


class RecordingWorld(LoopbackWorld):
    """Like `LoopbackWorld`; `transports[r].started` are rank r's messages of data in the order of their start."""

    transports: tuple[RecordingTransport, ...]

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.transports = tuple(RecordingTransport(self, rank) for rank in range(size))


class RecordingTransport(LoopbackTransport):
    """Counts prepared and freed batches of data, and lists every message of data that is started.

    The messages of agreements, which all travel below lane `SLOTS`, are left out.
    """

    def __init__(self, world: LoopbackWorld, rank: int) -> None:
        super().__init__(world, rank)
        self.started: list[Op] = []
        self.prepared = self.freed = 0

    def duplicate(self) -> RecordingTransport:
        """One communicator for each of these, so that the test holds what the communicator uses."""
        return self

    @property
    def held(self) -> int:
        """Batches of data that were prepared and not yet freed."""
        return self.prepared - self.freed

    def prepare(self, ops: Sequence[Op]) -> Any:
        batch: Any = super().prepare(ops)
        if any(op.lane < SLOTS for op in ops):
            return batch
        self.prepared += 1
        start, free = batch.start, batch.free

        def recorded(indices: Sequence[int]) -> None:
            self.started += [ops[index] for index in indices]
            start(indices)

        def counted() -> None:
            self.freed += 1
            free()

        batch.start, batch.free = recorded, counted
        return batch
