"""What tools read of each other's --json files, checked entry by entry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasp_coll.files import read_json


class ResultsError(ValueError):
    """A file that is no result of a tool; the message names file, entry, rule and what came."""


class Entry:
    """An object in a results file, which knows where it is."""

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict):
            raise ResultsError(f"{where} must be an object")
        self.where: str = where
        self.value: Mapping[str, Any] = value

    def entry(self, key: str) -> Entry:
        """The object under a key."""
        return Entry(f"{self.where}.{key}", self.value.get(key))

    def text(self, *keys: str) -> str:
        """The string under the first of these keys that there is."""
        found = next((self.value[key] for key in keys if self.value.get(key) is not None), None)
        if not isinstance(found, str) or not found.isprintable():
            raise ResultsError(f"{self.where}.{keys[0]} must be a name")
        return found

    def number(self, key: str, low: float = 0.0) -> float:
        """The number under a key, above `low`."""
        found = self.value.get(key)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not low < found < 1e30:
            raise ResultsError(f"{self.where}.{key} must be a number > {low:g}, and below 1e30")
        return float(found)

    def count(self, key: str, low: int) -> int:
        """The integer under a key, at least `low`."""
        found = self.value.get(key)
        if isinstance(found, bool) or not isinstance(found, int) or not low <= found < 1 << 31:
            raise ResultsError(f"{self.where}.{key} must be an integer >= {low}")
        return found

    def number_if_any(self, key: str) -> float | None:
        """The same; None where there is none, or null, or 0."""
        return self.number(key) if self.value.get(key) else None


def read(path: Path) -> tuple[Entry, list[Entry]]:
    """The file, and its results; ResultsError for what is none, OSError."""
    try:
        top = Entry(str(path), read_json(path))
    except ResultsError:
        raise
    except ValueError as error:
        raise ResultsError(f"{path}: {error}") from error
    results = top.value.get("results")
    if not isinstance(results, list):
        raise ResultsError(f"{path} must have a list of results")
    return top, [Entry(f"{path}: results[{i}]", value) for i, value in enumerate(results)]
