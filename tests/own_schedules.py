"""Schedules written by hand: what a user may pass as `algorithm`."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from tasp_coll import Schedule, Topology

Steps = Sequence[Sequence[tuple[int, ...]]]


def doubling_allgather(n: int) -> Steps:
    """Recursive doubling, n a power of two: in step t ranks exchange all they have with the one 2^t away.

    Each shard has a ring of its own, so that no ring carries two chunks over one link.
    """
    steps = []
    width = 1
    while width < n:
        blocks = [(rank, rank // width * width) for rank in range(n)]
        steps.append([(r, r ^ width, o, 0, o) for r, first in blocks for o in range(first, first + width)])
        width *= 2
    return steps


def backwards(steps: Sequence[Sequence[tuple[int, ...]]]) -> Steps:
    """Time reversal: an allgather becomes a reduce-scatter and the other way round."""
    return [[(dst, src, *what) for src, dst, *what in step] for step in reversed(steps)]


def tree_reduce_scatter(n: int, chunks: int = 1) -> Steps:
    """Every sum goes down its own binomial tree: in step t the odd multiples of 2^t send, seen from the root.

    Trees that cross the same link in the same step take rings of their own.
    """
    steps = []
    width = 1
    while width < n:
        hops = [
            ((root + r) % n, (root + r - width) % n, root, r // (2 * width))
            for root in range(n)
            for r in range(width, n, 2 * width)
        ]
        steps.append([(*hop, c, number * chunks + c) for *hop, number in hops for c in range(chunks)])
        width *= 2
    return steps


def trees(topology: Topology, collective: str) -> Schedule:
    """Any number of ranks, two chunks of unequal weight, binomial trees down, up, or both."""
    down = tree_reduce_scatter(topology.ranks, 2)
    up = backwards(down)
    steps = {"reduce_scatter": down, "allgather": up, "allreduce": [*down, *up]}[collective]
    weights = (Fraction(1, 3), Fraction(2, 3)) if steps else None
    return Schedule.from_steps(topology, collective, steps, weights=weights)
