"""What a caller asks for beside the arrays, and what all ranks must agree on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from tasp_coll.core import Core, max_rings
from tasp_coll.errors import ArgumentError, ArgumentTypeError
from tasp_coll.forecast import Choice
from tasp_coll.links import is_integer, is_share, number_of
from tasp_coll.schedule import STRETCH, Grain, Schedule

ALGORITHMS = ("auto", "rings", "ring", "direct", "hierarchical", "native")
NoneType = type(None)


class Options(NamedTuple):
    """What a caller may ask for beside the arrays."""

    algorithm: str | Schedule = "auto"
    rings: int | None = None
    op: str = "sum"
    counts: Any = None
    extra: str = ""  # of streams: what else must be the same on all ranks
    align: int = 1  # of streams: rows whose multiples chunks begin at,
    stretch: float = STRETCH  # where that makes none longer by more than this share

    @property
    def grain(self) -> Grain:
        """How a stream's rows are cut."""
        return Grain(int(self.align), float(self.stretch))

    def check_types(self, ranks: int) -> None:
        """ArgumentTypeError for what cannot even be compared."""
        if not isinstance(self.algorithm, (str, Schedule)):
            raise ArgumentTypeError(f"algorithm must be a name or a Schedule, got {self.algorithm!r}")
        if not isinstance(self.op, str):
            raise ArgumentTypeError(f"op must be a name, got {self.op!r}")
        if isinstance(self.rings, bool) or not hasattr(self.rings or 0, "__index__"):
            raise ArgumentTypeError(f"rings must be an integer or None, got {self.rings!r}")
        if not isinstance(self.counts, (tuple, NoneType)):
            raise ArgumentTypeError(f"counts must be {ranks} integers >= 0, got {self.counts!r}")
        if not is_integer(self.align):
            raise ArgumentTypeError(f"align must be an integer, got {self.align!r}")
        if number_of(self.stretch) is None:
            raise ArgumentTypeError(f"stretch must be a number, got {self.stretch!r}")

    def check(self, collective: str, core: Core) -> None:
        """ArgumentError for what cannot be meant."""
        if isinstance(self.algorithm, Schedule):
            self._check_schedule(self.algorithm, collective, core)
        elif self.algorithm not in ALGORITHMS:
            raise ArgumentError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")
        if self.align < 1:
            raise ArgumentError(f"align must be at least 1 row, got {self.align}")
        if not is_share(self.stretch):
            raise ArgumentError(f"stretch must be a number >= 0, got {self.stretch!r}")
        if self.rings is None:
            return
        if self.algorithm not in ("auto", "rings"):
            raise ArgumentError(
                f"rings applies to algorithm 'rings' only, got rings={self.rings!r} with {self.algorithm!r}"
            )
        core.schedule(collective, Choice("rings", self.rings))

    def _check_schedule(self, schedule: Schedule, collective: str, core: Core) -> None:
        theirs, ours, rings = schedule.topology, core.topology, max_rings(core.size)
        if schedule.collective != collective:
            raise ArgumentError(
                f"algorithm must be a schedule for {collective} on {ours.name!r}, got one for {schedule.collective} on "
                f"{theirs.name!r}"
            )
        if theirs.fingerprint != ours.fingerprint:
            raise ArgumentError(
                f"algorithm must be a schedule on {ours.name!r} ({ours.fingerprint}), got one on {theirs.name!r} "
                f"({theirs.fingerprint})"
            )
        if schedule.ring_count > rings:
            raise ArgumentError(f"algorithm must number its rings below {rings}, got ring {schedule.ring_count - 1}")
        core.proved(schedule)

    @property
    def named(self) -> str | None:
        """The algorithm that is asked for; None where it is to be chosen, or is a schedule."""
        if isinstance(self.algorithm, Schedule) or (self.algorithm == "auto" and self.rings is None):
            return None
        return "rings" if self.algorithm == "auto" else self.algorithm

    @property
    def label(self) -> str:
        """The algorithm as ranks compare it."""
        asked = self.algorithm
        return f"schedule {asked.fingerprint}" if isinstance(asked, Schedule) else str(asked)


@dataclass(frozen=True)
class Call:
    """What all ranks must agree on, and its signature."""

    described: tuple[tuple[str, object], ...]
    signature: bytes

    @classmethod
    def of(cls, **described: object) -> Call:
        """From what a rank passed."""
        pairs = tuple((key, value) for key, value in described.items() if value is not None)
        return cls(pairs, hashlib.blake2b(repr(pairs).encode(), digest_size=16).digest())
