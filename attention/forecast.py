"""What each method of attention takes, from what links and kernels give: the model behind `auto` and tools/simulate.py.

Stepwise methods compute with one step's keys while the next step's travel, so a step lasts as long as the longer of
the two; `allgather` and `ulysses` communicate first and compute then. Where moving data takes something from computing
(cores or SMs that both need), `interference` says how much. Numbers alone: needs neither torch nor ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

STEPWISE = {"ring": "ring", "tasp": "rings", "hierarchical": "hierarchical"}  # method: algorithm of its steps
METHODS = (*STEPWISE, "allgather", "ulysses")
BACKWARD = 2.5  # five products of matrices where forward has two
_WIDE = 4  # bytes of an element of what adds up, at least


class Travel(NamedTuple):
    """A collective on the links: seconds, and in how many steps that a stream hands over."""

    seconds: float
    steps: int


Links = Callable[[int, str, str], Travel | None]  # bytes of a shard, algorithm, collective; None: not possible there


@dataclass(frozen=True)
class Problem:
    """An attention over `tokens` tokens in all, cut over `ranks` ranks.

    heads of queries, kv_heads of keys, head_dim elements each, of itemsize bytes. window: a token sees so many, itself
    among them. kv_bits: of an element of keys and values as they travel; None: as they are.
    """

    ranks: int
    tokens: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2
    causal: bool = False
    backward: bool = False
    window: int | None = None
    kv_bits: float | None = None

    @property
    def local(self) -> int:
        """Tokens of the rank that has most."""
        return -(-self.tokens // self.ranks)

    @property
    def shard_bytes(self) -> int:
        """A rank's keys and values."""
        return 2 * self.kv_heads * self._head_bytes

    @property
    def wire_bytes(self) -> int:
        """The same as they travel."""
        return self.shard_bytes if self.kv_bits is None else int(self.shard_bytes * self.kv_bits / 8) // self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """The gradients of a rank's keys and values, which add up in a wide dtype."""
        return self.shard_bytes // self.itemsize * max(self.itemsize, _WIDE)

    @property
    def query_bytes(self) -> int:
        """A rank's queries, and as much its result."""
        return self.heads * self._head_bytes

    @property
    def dealt_bytes(self) -> int | None:
        """What a rank sends in both all-to-alls of `ulysses`; None where heads cannot be dealt out, or at few bits."""
        if self.kv_bits is not None or not deals(self.heads, self.kv_heads, self.ranks):
            return None
        return 2 * (self.heads + max(self.kv_heads, self.ranks)) * self._head_bytes

    @property
    def _head_bytes(self) -> int:
        return self.batch * self.head_dim * self.itemsize * self.local

    @property
    def operations(self) -> float:
        """Floating point operations of one rank's forward pass, work being even."""
        found = pairs((0, self.tokens), self.causal, self.window)
        return operations(self.batch, self.heads, self.head_dim, found) / self.ranks


def operations(batch: int, heads: int, head_dim: int, pairs: float) -> float:
    """Of a forward pass over so many (query, key) pairs in each head: two products, each to multiply and to add."""
    return 4.0 * batch * heads * head_dim * pairs


def pairs(bounds: Iterable[int], causal: bool, window: int | None) -> float:
    """(query, key) pairs that may see each other, of documents between these bounds, but for what rounding leaves."""
    found = 0.0
    for length in (stop - start for start, stop in pairwise(bounds)):
        reach = length if window is None else min(window, length)
        below = reach * length - reach * (reach - 1) / 2  # itself and those before
        found += below if causal else 2 * below - length
    return found


def deals(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether heads can be dealt out to so many ranks."""
    return not heads % ranks and (not kv_heads % ranks or not ranks % kv_heads)


class Computing(Protocol):
    """How long a rank computes."""

    def seconds(self, problem: Problem, parts: int, *, whole: bool = False, backward: bool = False) -> float:
        """In all, if it is done in so many equal parts; whole: over the whole sequence, of a part of the heads."""


@dataclass(frozen=True)
class Measured:
    """Computing as it was measured, in seconds of a rank: the same for all methods."""

    forward_s: float
    backward_s: float = 0.0

    def seconds(self, problem: Problem, parts: int, *, whole: bool = False, backward: bool = False) -> float:
        """As measured."""
        return self.backward_s if backward else self.forward_s


@dataclass(frozen=True)
class Device:
    """Computing from operations.

    flops: per second, of the forward kernel over long blocks. half: the tokens of a block with which it reaches half of
    that. backward: the rate of the backward kernel, a part of flops. step_s: what each part costs beside, launches
    above all. memory_GBps: at which results are merged (inf: fused with the kernel).
    """

    flops: float
    half: float = 0.0
    backward: float = 0.8
    step_s: float = 0.0
    memory_GBps: float = float("inf")

    def seconds(self, problem: Problem, parts: int, *, whole: bool = False, backward: bool = False) -> float:
        """All parts, and merging them."""
        tokens = problem.tokens if whole else problem.local
        rate = self.flops * tokens / (tokens + self.half)
        work = problem.operations / rate * (BACKWARD / self.backward if backward else 1.0)
        # Read and write the sum, read what is added.
        moved = problem.query_bytes / problem.itemsize * (2 * _WIDE + problem.itemsize) if parts > 1 else 0.0
        return work + parts * (self.step_s + moved / (self.memory_GBps * 1e9))


@dataclass(frozen=True)
class Phase:
    """Forward or backward: seconds in all, of computing, and of the links. parts: computations; steps: on the links."""

    seconds: float
    compute_s: float
    links_s: float
    parts: int
    steps: int
    stepwise: bool

    @property
    def exposed_s(self) -> float:
        """What communication adds to computing."""
        return max(self.seconds - self.compute_s, 0.0)


@dataclass(frozen=True)
class Estimate:
    """A method's time in seconds. memory_bytes: beyond inputs and results, roughly."""

    method: str
    forward: Phase
    backward: Phase | None
    memory_bytes: int

    @property
    def seconds(self) -> float:
        """Forward, and backward where that was asked for."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those there are."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


def overlapped(ranks: int, compute: float, links: float) -> float:
    """One's own keys first, then n-1 steps, each as long as the longer of computing it and bringing the next."""
    return pipelined(ranks - 1, compute, links)


def pipelined(steps: int, compute: float, links: float, interference: float = 0.0) -> float:
    """Seconds of steps + 1 equal computations, each beside the transfer for the next one.

    compute, links: seconds of all of them. interference: what of a second's computing a second of transfers costs.
    """
    if steps == 0:
        return compute
    computed, moved = compute / (steps + 1), links / steps
    return steps * max(computed + interference * moved, moved) + computed


def forecast(
    problem: Problem, method: str, links: Links, computing: Computing, interference: float = 0.0
) -> Estimate | None:
    """What a method takes; None where it cannot run. links: see `Links`; interference: see `pipelined`."""
    if problem.ranks == 1:
        return _alone(problem, method, computing)
    if method in STEPWISE:
        return _stepwise(problem, method, links, computing, interference)
    return _gathered(problem, links, computing) if method == "allgather" else _dealt(problem, links, computing)


def ccr(problem: Problem, links: Links, computing: Computing) -> float | None:
    """Computing over communicating on one ring, forward and backward."""
    found = forecast(problem, "ring", links, computing)
    if found is None or not (moved := sum(phase.links_s for phase in found.phases)):
        return None
    return sum(phase.compute_s for phase in found.phases) / moved


def _alone(problem: Problem, method: str, computing: Computing) -> Estimate:
    phases = [_phase(problem, computing, 0.0, 0.0, backward) for backward in _directions(problem)]
    return _estimate(method, phases, 0)


def _directions(problem: Problem) -> tuple[bool, ...]:
    return (False, True) if problem.backward else (False,)


def _phase(
    problem: Problem, computing: Computing, before: float, after: float, backward: bool, parts: int = 1
) -> Phase:
    """Communication, then computing, then communication."""
    compute = computing.seconds(problem, parts, whole=parts == 1 and problem.ranks > 1, backward=backward)
    return Phase(before + compute + after, compute, before + after, parts, 1, stepwise=False)


def _estimate(method: str, phases: list[Phase], held: int) -> Estimate:
    return Estimate(method, phases[0], phases[1] if len(phases) > 1 else None, held)


def _stepwise(
    problem: Problem, method: str, links: Links, computing: Computing, interference: float
) -> Estimate | None:
    algorithm = STEPWISE[method]
    keys = links(problem.wire_bytes, algorithm, "allgather")
    if keys is None:
        return None
    compute = computing.seconds(problem, keys.steps + 1)
    seconds = pipelined(keys.steps, compute, keys.seconds, interference)
    phases = [Phase(seconds, compute, keys.seconds, keys.steps + 1, keys.steps, stepwise=True)]
    if problem.backward:
        gradients = links(problem.gradient_bytes, algorithm, "reduce_scatter")
        if gradients is None or method == "hierarchical":  # which has no mirror image step by step
            return None
        phases.append(_mirrored(problem, keys, gradients, computing, interference))
    held = 2 * problem.shard_bytes + (2 * problem.gradient_bytes if problem.backward else 0)
    return _estimate(method, phases, held + _sums(problem))


def _mirrored(problem: Problem, keys: Travel, gradients: Travel, computing: Computing, interference: float) -> Phase:
    """Keys come one step ahead of computing, gradients leave one step behind; one's own keys are the last."""
    steps = keys.steps
    compute = computing.seconds(problem, steps + 1, backward=True)
    computed, there, back = compute / (steps + 1), keys.seconds / steps, gradients.seconds / steps
    seconds = there
    for step in range(1, steps + 2):
        moved = (there if step < steps else 0.0) + (back if step > 1 else 0.0)
        seconds += max(computed + interference * moved, moved)
    return Phase(seconds, compute, keys.seconds + gradients.seconds, steps + 1, steps, stepwise=True)


def _gathered(problem: Problem, links: Links, computing: Computing) -> Estimate | None:
    keys = links(problem.wire_bytes, "auto", "allgather")
    if keys is None:
        return None
    phases, held = [_phase(problem, computing, keys.seconds, 0.0, False, parts=2)], problem.shard_bytes
    if problem.backward:
        home = links(problem.gradient_bytes, "auto", "reduce_scatter")
        if home is None:
            return None
        phases.append(_phase(problem, computing, keys.seconds, home.seconds, True, parts=2))
        held += problem.gradient_bytes
    return _estimate("allgather", phases, problem.ranks * held + _sums(problem))


def _dealt(problem: Problem, links: Links, computing: Computing) -> Estimate | None:
    if (dealt := problem.dealt_bytes) is None:
        return None
    moved = links(dealt // problem.ranks, "direct", "allgather")  # what an all-to-all of so many bytes puts on links
    if moved is None:
        return None
    phases = [_phase(problem, computing, moved.seconds, 0.0, backward) for backward in _directions(problem)]
    return _estimate("ulysses", phases, 2 * dealt)


def _sums(problem: Problem) -> int:
    """What results add up in, and the block's that is added."""
    wide = problem.query_bytes // problem.itemsize * max(problem.itemsize, _WIDE)
    return wide + problem.query_bytes
