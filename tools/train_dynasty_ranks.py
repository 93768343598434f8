"""The ranks that share a training of train_dynasty.py: each computes its part of every batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import tasp_coll

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Ranks:
    """This rank among those that train together; `world` and `comm` are None where it is alone."""

    world: MPI.Intracomm | None = None
    comm: tasp_coll.Communicator | None = None

    @property
    def rank(self) -> int:
        """This one's."""
        return 0 if self.comm is None else self.comm.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.comm is None else self.comm.size

    def mine(self, count: int) -> slice:
        """This rank's part of so many examples in a row, as even as can be."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Of each value, over all ranks."""
        if self.world is None:
            return list(values)
        return [sum(each) for each in zip(*self.world.allgather(list(values)), strict=True)]

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Each step's, as long as on the slowest rank."""
        if self.world is None:
            return list(seconds)
        return [max(each) for each in zip(*self.world.allgather(list(seconds)), strict=True)]

    def wait(self) -> None:
        """For the others."""
        if self.world is not None:
            self.world.barrier()

    def share_buffers(self, model: nn.Module) -> None:
        """Give all the means that BatchNorm keeps on rank 0, as torch's DistributedDataParallel does."""
        for module in model.modules():
            if self.world is not None and isinstance(module, nn.BatchNorm2d):
                for held in module.buffers():
                    held.copy_(torch.from_numpy(self.world.bcast(held.cpu().numpy())))


@dataclass
class Exchange:
    """Gradients to their mean over ranks, in one of train_dynasty_options.GRADS, and what that took in every step."""

    ranks: Ranks
    grads: str
    mean_bits: float
    feedback: Any = field(init=False)
    bytes: list[int] = field(default_factory=list)
    float32_bytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        import dynasty

        self.feedback = dynasty.Feedback()

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """In place; collective."""
        import dynasty

        self.ranks.wait()  # the exchange alone is timed, not the others' computing
        begun = time.perf_counter()
        bits = 8 if self.grads == "8" else self.grads
        sent = dynasty.all_reduce(
            list(gradients), self.ranks.comm, op="mean", bits=bits, mean_bits=self.mean_bits, feedback=self.feedback
        )
        self.seconds.append(time.perf_counter() - begun)
        self.bytes.append(sent.bytes)
        self.float32_bytes.append(sent.float32_bytes)

    def summary(self) -> dict[str, float]:
        """Of a step: bytes that a rank sends on average, and seconds, median, on the slowest rank; collective."""
        steps = max(1, len(self.bytes)) * self.ranks.size
        sent, whole = self.ranks.sums([sum(self.bytes) / steps, sum(self.float32_bytes) / steps])
        exchange, step = (self.ranks.slowest(each) for each in (self.seconds, self.step_seconds))
        return {
            "bytes": sent,
            "float32_bytes": whole,
            "seconds": median(exchange) if exchange else 0.0,
            "step_seconds": median(step) if step else 0.0,
        }
