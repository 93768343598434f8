"""Attention timed: the methods in rotating order, with communication alone and computation alone between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import tasp_coll
from attention import record
from attention.kernel_parts import wide
from attention.tracing import Recording, Span
from attention_methods import Method
from attention_options import Options
from perf_measure import turns

if TYPE_CHECKING:
    from mpi4py import MPI

KINDS = ("compute", "wait", "merge")


class Inputs(NamedTuple):
    """This rank's, (B, H, L, D) and (B, Hkv, L, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor


class Outcome(NamedTuple):
    """The result, the gradients of query, key and value, if any, and where the time went."""

    out: Tensor
    gradients: tuple[Tensor, ...]
    forward: Recording
    backward: Recording


@dataclass(frozen=True)
class Parts:
    """Seconds of one iteration on its slowest rank: forward and backward, each (compute, wait, merge)."""

    total: float
    forward: tuple[float, ...]
    backward: tuple[float, ...]

    def seconds(self, kind: str) -> float:
        """Of a kind, forward and backward."""
        place = KINDS.index(kind)
        return self.forward[place] + self.backward[place]

    def work(self) -> tuple[float, float]:
        """Computing and merging, forward and backward."""
        return self.forward[0] + self.forward[2], self.backward[0] + self.backward[2]


@dataclass(frozen=True)
class Times:
    """All iterations: of the methods, of the computation alone by the way it is cut (`alone` of `measure`), and of the
    exchange on one ring, forward and backward."""

    methods: tuple[tuple[Parts, ...], ...]
    compute: dict[str, tuple[Parts, ...]]
    exchange: tuple[tuple[float, ...], tuple[float, ...]]


@dataclass
class Bench:
    """The loop. What it does is collective."""

    world: MPI.Intracomm
    comm: tasp_coll.Communicator
    options: Options
    device: torch.device
    progress: Callable[[], object] = lambda: None  # called after every round
    spans: list[Span] = field(default_factory=list)  # of the last round
    _inputs: dict[int, Inputs] = field(default_factory=dict)

    def rounds(self) -> int:
        """How often `progress` will be called."""
        return self.options.warmup + self.options.iters

    def inputs(self, method: Method) -> Inputs:
        """Random numbers for this rank's tokens."""
        length = len(method.positions())
        if length not in self._inputs:
            options, random = self.options, torch.Generator().manual_seed(self.world.rank)
            dtype = getattr(torch, options.dtype)
            shapes = ((options.batch, heads, length, options.head_dim) for heads in self._heads())
            drawn = (torch.randn(shape, generator=random).to(self.device, dtype) for shape in shapes)
            self._inputs[length] = Inputs(*drawn)
        return self._inputs[length]

    def settle(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _heads(self) -> tuple[int, ...]:
        options = self.options
        return options.heads, options.kv_heads, options.kv_heads, options.heads

    def once(self, method: Method) -> Outcome:
        """One call, and its backward."""
        *inputs, grad = self.inputs(method)
        leaves = [x.detach().requires_grad_(self.options.backward) for x in inputs]
        with record() as forward:
            out = method.attend(*leaves)
        with record() as backward:
            gradients = torch.autograd.grad(out, leaves, grad) if self.options.backward else ()
        return Outcome(out.detach(), gradients, forward, backward)

    def measure(self, methods: Sequence[Method], alone: Sequence[Method]) -> Times:
        """methods: those that are compared. alone: those that compute without communicating, step by step first."""
        from mpi4py import MPI

        exchange = _Exchange(self.comm, self.inputs(alone[0]))
        calls: list[Callable[[], Outcome | None]] = [
            *(lambda method=method: self.once(method) for method in (*methods, *alone)),
            exchange.forward,
            exchange.backward,
        ]
        names = [method.label for method in methods] + [f"{method.name} alone" for method in alone]
        names += ["exchange alone", "exchange back alone"]
        seen = np.zeros((len(calls), self.options.iters, 1 + 2 * len(KINDS)))
        for iteration in range(-self.options.warmup, self.options.iters):
            self.spans.clear()
            for position in turns(len(calls), iteration):
                if position == len(calls) - 1 and not self.options.backward:
                    continue
                self.world.Barrier()
                begun = perf_counter()
                outcome = calls[position]()
                self.settle()
                ended = perf_counter()
                self._keep(names[position], begun, ended, outcome)
                if iteration >= 0:
                    seen[position, iteration] = [ended - begun, *_seconds(outcome)]
            self.progress()
        everyone = np.empty((self.world.size, *seen.shape))
        self.world.Allgather([seen, MPI.DOUBLE], [everyone, MPI.DOUBLE])
        return _times(everyone, [method.name for method in alone])

    def _keep(self, name: str, begun: float, ended: float, outcome: Outcome | None) -> None:
        self.spans.append(Span(name, -1, begun, ended))
        if outcome is not None:
            self.spans += [*outcome.forward.spans, *outcome.backward.spans]


def _seconds(outcome: Outcome | None) -> list[float]:
    if outcome is None:
        return [0.0] * 2 * len(KINDS)
    return [recording.seconds(kind) for recording in (outcome.forward, outcome.backward) for kind in KINDS]


def _times(everyone: np.ndarray[Any, Any], alone: Sequence[str]) -> Times:
    """everyone: (ranks, calls, iterations, figures); of each call and iteration the slowest rank counts.

    alone: names of the calls before the last two.
    """
    slowest = everyone[..., 0].argmax(0)
    figures = np.take_along_axis(everyone, slowest[None, ..., None], 0)[0].tolist()
    split = 1 + len(KINDS)
    timed = [tuple(Parts(row[0], tuple(row[1:split]), tuple(row[split:])) for row in rows) for rows in figures[:-2]]
    forward, backward = (tuple(row[0] for row in rows) for rows in figures[-2:])
    first = len(timed) - len(alone)
    return Times(tuple(timed[:first]), dict(zip(alone, timed[first:], strict=True)), (forward, backward))


class _Exchange:
    """Keys and values once round one ring, and round it backwards with their gradients; nothing is computed."""

    def __init__(self, comm: tasp_coll.Communicator, inputs: Inputs) -> None:
        self._comm = comm
        self._rows = torch.stack([inputs.key, inputs.value]).permute(3, 0, 1, 2, 4).contiguous()
        self._home = torch.empty_like(self._rows, dtype=wide(self._rows.dtype))

    def forward(self) -> None:
        for _ in self._comm.allgather_steps(self._rows, algorithm="ring"):
            pass

    def backward(self) -> None:
        requests = iter(self._comm.reduce_scatter_steps(self._home, algorithm="ring"))
        for _ in self._comm.allgather_steps(self._rows, algorithm="ring", reverse=True):
            next(requests)
        for _ in requests:
            pass
