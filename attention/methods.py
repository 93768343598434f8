"""How keys and values reach the queries: step by step on rings, all at once, or heads instead of tokens.

`Rings` is the paper's method (`tasp`: all rings) and ring attention (`ring`: one), which differ in nothing but the
number of rings. Forward holds two steps of keys and values: the one that is computed with, and the one that travels.
Backward sends them round in the opposite direction, so that each rank's gradients, collected on the way, are home after
n-1 hops. Where keys and values travel in few bits, backward sends the same integers again: it differentiates what
forward computed, and hands the gradients of what arrived to what was sent (straight through).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attention import wire
from attention.blocks import Layout, Task, gathered_blocks, local_blocks, step_blocks
from attention.compute import Compute, Gradients, Part, Saved
from attention.kernel_parts import wide
from attention.merge import Partial
from attention.partition import STRETCH, Indices
from attention.tracing import note, span
from attention.wire_bits import Codec


@dataclass(frozen=True)
class Job:
    """One rank's side of an attention: what is to be computed, with what, and who the others are.

    codec: by which keys and values travel; None: as they are. stretch: as in `Communicator.allgather_steps`.
    """

    comm: Any  # tasp_coll.Communicator
    task: Task
    compute: Compute
    codec: Codec | None = None
    stretch: float = STRETCH

    @property
    def grain(self) -> dict[str, Any]:
        """How shards are cut into chunks."""
        return {"align": self.task.partition.align, "stretch": self.stretch}

    def sent(self, tokens: Tensor) -> Tensor:
        """(..., 2, B, Hkv, D) as it travels."""
        return tokens if self.codec is None else self.codec.encode(tokens)

    def received(self, data: Tensor, dtype: torch.dtype, step: int = -1) -> Tensor:
        """The way back, into keys' dtype."""
        if self.codec is None:
            return data
        with span("pack", step):
            return self.codec.decode(data, dtype)


class Method(Protocol):
    """query (B, H, L, D), key and value (B, Hkv, L, D), this rank's tokens in held order."""

    def forward(self, job: Job, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """out (B, H, L, D) and lse (B, H, L)."""

    def backward(self, job: Job, saved: Saved, key: Tensor, value: Tensor) -> Gradients:
        """Gradients of query, key and value, in the wide dtype or in their own."""


@dataclass(frozen=True)
class Rings:
    """Step by step. algorithm: of `Communicator.allgather_steps`: "rings" or "ring"."""

    algorithm: str

    def forward(self, job: Job, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        into = Partial(query)
        task = job.task
        for step, layout, rows in self._arrivals(job, key, value, reverse=False):
            if step == 0:
                job.compute.forward(local_blocks(task), query, key, value, into)
            else:
                keys, values = wire.sides(rows)
                job.compute.forward(step_blocks(task, layout), query, keys, values, into, step)
        return into.finish()

    def backward(self, job: Job, saved: Saved, key: Tensor, value: Tensor) -> Gradients:
        """Request t of the gradients' stream is for the chunks of the keys' arrival t + 1; one's own come last."""
        task, compute, dtype = job.task, job.compute, wide(key.dtype)
        partition, rank = task.partition, task.rank
        dquery = torch.zeros_like(saved.query, dtype=dtype)
        home = wire.empty(partition, rank, key, dtype)
        arrivals = self._arrivals(job, key, value, reverse=True)
        next(arrivals)
        with job.comm.reduce_scatter_steps(home, algorithm=self.algorithm, accumulate=True, **job.grain) as requests:
            for step, layout, rows in arrivals:
                parts = compute.parts(step_blocks(task, layout), saved, *wire.sides(rows), dquery, step)
                self._add(requests, parts, step)
            parts = compute.parts(local_blocks(task), saved, key, value, dquery, job.comm.size)
            self._add(requests, parts, job.comm.size, wire.places(partition, rank))
        dkey, dvalue = (torch.empty_like(x) for x in (key, value))
        wire.unpack(partition, rank, home, dkey, dvalue)
        return dquery, dkey, dvalue

    @staticmethod
    def _add(requests: Any, parts: list[Part], step: int, moved: Indices | None = None) -> None:
        """Only now wait for what the ranks before have added up: it had the time of the computation to come."""
        with span("wait", step):
            request = next(requests)
        for part in parts:
            part.add(wire.sides(request.data), step, moved)
        requests.release()  # so that it travels while the next part is computed

    def _arrivals(self, job: Job, key: Tensor, value: Tensor, reverse: bool) -> Iterator[tuple[int, Layout, Tensor]]:
        """(step, layout, rows) of each step; the first is this rank's own, whose rows nobody needs."""
        with span("pack"):
            rows = job.sent(wire.pack(job.task.partition, job.task.rank, key, value))
        with job.comm.allgather_steps(
            rows, algorithm=self.algorithm, reverse=reverse, donate=True, **job.grain
        ) as stream:
            arrivals = iter(stream)
            for step, layout in enumerate(stream.layout):
                with span("wait", step):
                    arrival = next(arrivals)
                if arrival.began is not None and arrival.ended is not None:
                    note("transfer", step, arrival.began, arrival.ended)
                rows = job.received(arrival.data, key.dtype, step) if step else arrival.data
                yield step, tuple((row.source, row.start, row.stop) for row in layout), rows


class Gather:
    """All keys and values on every rank, then one computation: nothing overlaps, and memory grows with the sequence."""

    def forward(self, job: Job, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        into = Partial(query)
        keys, values = wire.token_sides(self._gathered(job, key, value))
        job.compute.forward(local_blocks(job.task), query, key, value, into)
        job.compute.forward(gathered_blocks(job.task), query, keys, values, into, 1)
        return into.finish()

    def backward(self, job: Job, saved: Saved, key: Tensor, value: Tensor) -> Gradients:
        task, dtype = job.task, wide(key.dtype)
        gathered = self._gathered(job, key, value)
        gradients = torch.zeros_like(gathered, dtype=dtype)
        keys, values = wire.token_sides(gathered)
        dquery = torch.zeros_like(saved.query, dtype=dtype)
        dkey, dvalue = wire.token_sides(gradients)
        own = slice(start := sum(task.partition.lengths[: task.rank]), start + key.shape[2])
        mine = dquery, dkey[:, :, own], dvalue[:, :, own]
        job.compute.backward(local_blocks(task), saved, key, value, mine)
        job.compute.backward(gathered_blocks(task), saved, keys, values, (dquery, dkey, dvalue), 1)
        with span("wait", 1):
            home = job.comm.decomposed_reduce_scatter(gradients, counts=task.partition.lengths)
        return dquery, *wire.token_sides(home)

    @staticmethod
    def _gathered(job: Job, key: Tensor, value: Tensor) -> Tensor:
        """(total, 2, B, Hkv, D), rank after rank."""
        with span("pack"):
            tokens = job.sent(torch.stack([key, value]).permute(3, 0, 1, 2, 4).contiguous())
        with span("wait"):
            gathered = job.comm.decomposed_allgatherv(tokens)
        return job.received(gathered, key.dtype)


class Local:
    """On one rank that holds all tokens there is nobody to wait for."""

    def forward(self, job: Job, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        into = Partial(query)
        job.compute.forward(local_blocks(job.task), query, key, value, into)
        return into.finish()

    def backward(self, job: Job, saved: Saved, key: Tensor, value: Tensor) -> Gradients:
        query_key_value = saved.query, key, value
        dquery, dkey, dvalue = (torch.zeros_like(x, dtype=wide(x.dtype)) for x in query_key_value)
        job.compute.backward(local_blocks(job.task), saved, key, value, (dquery, dkey, dvalue))
        return dquery, dkey, dvalue
