"""The diaries that ranks under break_links.py write, read while they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from break_links_seen import Call, Failure


class Diaries:
    """What ranks have told so far."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._paths = [folder / f"{rank}.diary" for rank in range(ranks)]
        self._offsets = [0] * ranks
        self._events: list[tuple[int, dict[str, Any]]] = []

    def read(self) -> bool:
        """Take in what is new; whether anything is."""
        before = len(self._events)
        for rank, path in enumerate(self._paths):
            if path.exists() and path.stat().st_size > self._offsets[rank]:
                with open(path, "rb") as file:
                    file.seek(self._offsets[rank])
                    lines = file.read().splitlines(keepends=True)
                whole = [line for line in lines if line.endswith(b"\n")]
                self._offsets[rank] += sum(map(len, whole))
                self._events += [(rank, json.loads(line)) for line in whole]
        return len(self._events) > before

    def begun(self, number: int) -> bool:
        """Whether all ranks are in this call."""
        ranks = {rank for rank, each in self._events if each["event"] == "begun" and each["call"] == number}
        return len(ranks) == len(self._paths)

    def usual_s(self, before: int) -> float:
        """Median of the calls so far, but the first."""
        return median(each.ended - each.began for each in self.calls() if 0 < each.call < before)

    def calls(self) -> tuple[Call, ...]:
        """Calls that gave a result, on any rank."""
        return tuple(
            Call(**(each | {"dead": _tuples(each["dead"]), "slower": _tuples(each["slower"])}))
            for each in self._those("done")
        )

    def failures(self) -> tuple[Failure, ...]:
        """Calls that raised, on any rank."""
        return tuple(Failure(**(each | {"links": _tuples(each["links"])})) for each in self._those("failed"))

    def _those(self, event: str) -> Iterator[dict[str, Any]]:
        for rank, each in self._events:
            if each["event"] == event:
                yield {"rank": rank} | {key: value for key, value in each.items() if key != "event"}


def _tuples(lists: list[list[Any]]) -> tuple[Any, ...]:
    return tuple(map(tuple, lists))
