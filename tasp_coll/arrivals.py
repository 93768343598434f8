"""What a stream of steps hands over: rows, and where they come from. Their arrays are made when they are looked at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tasp_coll import arrays
from tasp_coll.arrays import Buffer, DeviceBytes, NDArray
from tasp_coll.core import Shape
from tasp_coll.errors import CollectiveError
from tasp_coll.executor import Place


class Views:
    """Makes the arrays of one step, once each, until the step is over: then their memory is used for other things."""

    def __init__(
        self,
        like: Buffer,
        stage: NDArray | DeviceBytes,
        readonly: bool,
        looking: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """looking: the context in which arrays are made."""
        self._like, self._stage, self._looking = like, stage, looking
        self._rest = Shape.of(like.shape).rest
        # torch has no read-only view, only a copy: there the caller is trusted.
        self._readonly = readonly and like.kind != "torch"
        self.over = False

    def rows(self, place: Place, rows: int) -> Any:
        """The array (rows, *rest) at a place of "stage", or of the array that the caller passed."""
        if self.over:
            raise CollectiveError("the data of a step must be looked at before the next step, or the stream's end")
        memory, offset = self._stage, place.offset
        if place.region != "stage" or not place.nbytes:
            memory, offset = arrays.part(self._like, offset, place.nbytes), 0
        with self._looking():
            return arrays.view(self._like, memory, offset, (rows, *self._rest), readonly=self._readonly)


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of rank `source`'s shard, on ring `ring`."""

    source: int
    ring: int
    start: int
    stop: int
    _place: Place = field(repr=False, compare=False)
    _views: Views = field(repr=False, compare=False)

    @cached_property
    def data(self) -> Any:
        """The rows, (stop - start, *rest), a view; valid until the next step."""
        return self._views.rows(self._place, self.stop - self.start)


@dataclass(frozen=True)
class Arrival:
    """What one step brings, or asks for; valid until the next step is asked for, or the stream ends.

    chunks: sorted by source and ring. began, ended: `time.perf_counter()` seconds when the step's first receive was
    started and when all that it brings was there; None where nothing had to come, and on a GPU, where the caller's
    stream comes after it and no host knows when.
    """

    step: int
    chunks: tuple[Chunk, ...]
    began: float | None
    ended: float | None
    _stretch: Place | None = field(repr=False, compare=False)
    _views: Views = field(repr=False, compare=False)

    @cached_property
    def data(self) -> Any:
        """All chunks as one array, their rows one after another in the order of `chunks`, a view.

        (rows of all chunks, *rest), the memory of the chunks' own `data`. None where they do not lie together, as with
        "hierarchical".
        """
        if self._stretch is None:
            return None
        return self._views.rows(self._stretch, sum(chunk.stop - chunk.start for chunk in self.chunks))
