"""Messages that come and go one by one, all polled at once, on any transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tasp_coll.transport import Batch, Op


class BatchPool:
    """See `transport.Pool`; made of batches of one message each."""

    def __init__(self, prepare: Callable[[Sequence[Op]], Batch]) -> None:
        self._prepare = prepare
        self._flying: dict[int, Batch] = {}
        self._next = 0

    def start(self, op: Op) -> int:
        number, self._next = self._next, self._next + 1
        batch = self._flying[number] = self._prepare([op])
        batch.start_all()
        return number

    def test(self) -> list[int]:
        done = [number for number, batch in self._flying.items() if batch.test_some()]
        for number in done:
            self._flying.pop(number).free()
        return done

    def close(self) -> bool:
        return not self._flying
