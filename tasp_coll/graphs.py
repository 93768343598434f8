"""The CUDA graphs of a communicator's calls, and which calls may become one; `gpu_graphs` makes and launches them.

A graph saves launches, which matters where little moves, and holds memory: larger calls are left alone, and so are new
ones once there are many. TASP_COLL_CUDA_GRAPHS=0 on any rank turns graphs off on all.
"""

from __future__ import annotations

import os
from collections.abc import Hashable

from tasp_coll.device import Graph

ENVIRONMENT = "TASP_COLL_CUDA_GRAPHS"
NEW, SEEN, CAPTURED = -1, 0, 1  # what a rank says of a call in its header, -1 where it says nothing
LARGEST = 1 << 24  # bytes of an array
_KEPT, _NOTED = 256, 1024


class Graphs:
    """By call and addresses."""

    def __init__(self) -> None:
        self.off = os.environ.get(ENVIRONMENT, "1") == "0"
        self._kept: dict[Hashable, Graph] = {}
        self._seen: dict[Hashable, None] = {}

    def ready(self, key: Hashable, nbytes: int) -> int:
        """What this rank says of a call: NEW, SEEN or CAPTURED. nbytes: of the larger of its arrays."""
        if self.off or nbytes > LARGEST:
            return NEW
        if key in self._kept:
            return CAPTURED
        return SEEN if key in self._seen and len(self._kept) < _KEPT else NEW

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def __getitem__(self, key: Hashable) -> Graph:
        return self._kept[key]

    def note(self, key: Hashable) -> None:
        """The call was carried out once."""
        self._seen[key] = None
        if len(self._seen) > _NOTED:
            self._seen.pop(next(iter(self._seen)))

    def keep(self, key: Hashable, graph: Graph) -> None:
        """The call is CAPTURED."""
        self._kept[key] = graph

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._seen.clear()
