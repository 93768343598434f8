"""Which topologies are tori: grids of ranks that are wrapped round every way, with equal links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tasp_coll.topology import Topology


def sides_of(topology: Topology) -> tuple[int, ...] | None:
    """The sides, each at least 2, of a torus whose ranks are numbered row by row; None for any other topology.

    Seen from the links, whatever the topology's name: all of one rate, and none but to the ranks beside. Along a side
    of 2 there is one link, so that hypercubes are tori too. Not for two and three ranks, which are full meshes.
    """
    if topology.switches or topology.is_full_mesh:
        return None
    near = [int(link.target) for link in topology.links if link.source == 0]
    if len(topology.links) != len(near) * topology.ranks or len({link.GBps for link in topology.links}) != 1:
        return None
    codes = np.array([int(link.source) * topology.ranks + int(link.target) for link in topology.links], np.int64)
    return next((sides for sides in _guesses(near, 1, topology.ranks) if np.array_equal(codes, arcs(sides))), None)


def _guesses(near: Sequence[int], stride: int, ranks: int) -> Iterator[tuple[int, ...]]:
    """The sides that rank 0's neighbours allow, ascending: at `stride`, and at the last rank of the row."""
    if not near:
        if stride == ranks:
            yield ()
    elif near[0] == stride:
        for rest in _guesses(near[1:], 2 * stride, ranks):
            yield (*rest, 2)
        last, odd = divmod(near[1], stride) if len(near) > 1 else (0, 1)
        if not odd:
            for rest in _guesses(near[2:], stride * (last + 1), ranks):
                yield (*rest, last + 1)


def arcs(sides: Sequence[int]) -> NDArray[np.int64]:
    """src * ranks + dst of every directed link of a torus, ascending."""
    ranks, stride = int(np.prod(sides)), 1
    rank = np.arange(ranks)
    found = []
    for side in reversed(sides):
        at = rank // stride % side
        for step in {1, side - 1}:
            found.append(rank * ranks + rank + ((at + step) % side - at) * stride)
        stride *= side
    return np.sort(np.concatenate(found))
