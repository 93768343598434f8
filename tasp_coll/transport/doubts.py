"""Which links are silent though something is to cross them, and which of them to give up.

A peer that is silent on its link for a share of the timeout is asked, over the link and through other ranks. If it
answers through others only, its link is dead; if it answers nowhere, it is itself gone or stopped, which is for the
timeout to say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

_ASK, _ASK_AGAIN, _GIVE_UP = 0.3, 0.1, 0.6  # shares of the timeout
_LOOK = 0.02  # of the timeout, between looks


@dataclass
class _Doubt:
    """A peer that was asked whether it is there."""

    asked: float
    again: float  # when it was asked last
    around: float | None = None  # when it answered through others


class Doubts:
    """One rank's doubts about its links. All times are `time.monotonic()`."""

    def __init__(self, timeout: float, now: float) -> None:
        self._timeout, self._looked = timeout, now
        self._heard: dict[int, float] = defaultdict(lambda: now)
        self._owed: dict[int, int] = defaultdict(int)
        self._doubts: dict[int, _Doubt] = {}

    def owe(self, peer: int, now: float) -> None:
        """One more message is to come or to go; where there was none, silence was right."""
        if not self._owed[peer]:
            self._heard[peer] = now
        self._owed[peer] += 1

    def settle(self, peer: int) -> None:
        """It has come, or has been acknowledged."""
        self._owed[peer] -= 1

    @property
    def any_owed(self) -> bool:
        """Whether anything is to come or to go."""
        return any(self._owed.values())

    def hear(self, peer: int, now: float) -> None:
        """Something came over the link."""
        self._heard[peer] = now
        self._doubts.pop(peer, None)

    def hear_around(self, peer: int, now: float) -> None:
        """The peer answered through others."""
        doubt = self._doubts.get(peer)
        if doubt is not None and doubt.around is None:
            doubt.around = now

    def drop(self, peer: int) -> None:
        """The link has been given up."""
        self._doubts.pop(peer, None)

    def look(self, peers: Iterable[int], now: float) -> tuple[list[int], list[int]]:
        """Of these peers those to ask, and those whose links to give up."""
        if now - self._looked < self._timeout * _LOOK:
            return [], []
        self._looked = now
        ask, dead = [], []
        for peer in peers:
            doubt = self._doubts.get(peer)
            if doubt is None:
                if self._owed[peer] and now - self._heard[peer] > _ASK * self._timeout:
                    self._doubts[peer] = _Doubt(now, now)
                    ask.append(peer)
            elif self._is_dead(doubt, now):
                dead.append(peer)
            elif now - doubt.again > _ASK_AGAIN * self._timeout:  # the question may have met another dead link
                doubt.again = now
                ask.append(peer)
        return ask, dead

    def _is_dead(self, doubt: _Doubt, now: float) -> bool:
        """Asked long enough ago, and the answer through others did not just come first."""
        share = (_GIVE_UP - _ASK) * self._timeout
        return doubt.around is not None and now - doubt.asked > share and now - doubt.around > share / 3
