"""A fluid simulation of messages: from one arrival, or one end of a transfer, to the next."""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np

from tasp_coll.simulate_links import Floats, Ints
from tasp_coll.simulate_messages import Messages

_SAME = 1e-9  # relative: events so close together are one


class Outcome(NamedTuple):
    """When each message has arrived, seconds, how many moments something happened at, and whether that is all."""

    arrived: Floats
    events: int
    complete: bool


def simulate(messages: Messages, shard_bytes: float, message_s: float, limit: float = math.inf) -> Outcome:
    """Let the messages flow. message_s: delay of every message beside the latency of its path, seconds.

    It gives up after `limit` moments.

    The messages of a pair of ranks share one connection, on which they go one after another, in the order in which
    they may start; connections share links fairly. A message that has left arrives when its delay is over; the next
    one of the connection does not wait for that.
    """
    return _Run(messages, shard_bytes, message_s).outcome(limit)


class _Run:
    """State of a simulation. Messages of a pair that may start stand in a queue: `head`, `next`, `tail`."""

    def __init__(self, messages: Messages, shard_bytes: float, message_s: float) -> None:
        self.messages, self.routes = messages, messages.routes
        self.nbytes = messages.share * shard_bytes
        self.delay = self.routes.delay + message_s
        pairs, count = len(self.delay), len(messages.src)
        self.waits = messages.waits.copy()
        self.head, self.tail = (np.full(pairs, -1, np.int64) for _ in range(2))
        self.next = np.full(count, -1, np.int64)
        self.left = np.zeros(pairs)
        self.arrived = np.zeros(count)
        self.due: list[tuple[float, int, Ints]] = []  # messages that have left, by time of arrival
        self.now, self.events, self.pushed = 0.0, 0, 0

    def outcome(self, limit: float) -> Outcome:
        """Run to the end, or for `limit` moments."""
        self._allow(np.flatnonzero(self.waits == 0))
        active = np.zeros(len(self.head), np.bool_)
        rates = np.zeros(len(self.head))
        until = 0.0
        while self.events < limit:
            wanted = self.head >= 0
            if (wanted != active).any():
                active, rates = wanted, self.routes.fair_rates(wanted)
            busy = np.flatnonzero(active)
            lasts = self.left[busy] / rates[busy]
            until = min(self.now + lasts.min(initial=np.inf), self.due[0][0] if self.due else np.inf)
            if until == np.inf:
                break
            self._advance(until, busy, lasts, rates)
        return Outcome(self.arrived, self.events, until == np.inf)

    def _advance(self, until: float, busy: Ints, lasts: Floats, rates: Floats) -> None:
        span, self.now = until - self.now, until
        self.events += 1
        self.left[busy] = np.maximum(self.left[busy] - rates[busy] * span, 0.0)
        self._depart(busy[lasts <= span + _SAME * until])
        arriving = []
        while self.due and self.due[0][0] <= until * (1 + _SAME):
            arriving.append(heapq.heappop(self.due)[2])
        if arriving:
            self._arrive(np.concatenate(arriving))

    def _depart(self, pairs: Ints) -> None:
        """The messages at the head of these pairs are through."""
        gone = self.head[pairs]
        self.head[pairs] = self.next[gone]
        more = pairs[self.head[pairs] >= 0]
        self.left[more] = self.nbytes[self.head[more]]
        delays = self.delay[pairs]
        for delay in np.unique(delays).tolist():
            self.pushed += 1  # of equal times the first to leave arrives first
            heapq.heappush(self.due, (self.now + delay, self.pushed, gone[delays == delay]))

    def _arrive(self, arriving: Ints) -> None:
        messages = self.messages
        self.arrived[arriving] = self.now
        low, high = messages.first[arriving], messages.first[arriving + 1]
        lengths = high - low
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        followers, times = np.unique(messages.follows[np.repeat(low, lengths) + within], return_counts=True)
        self.waits[followers] -= times
        self._allow(followers[self.waits[followers] == 0])

    def _allow(self, ready: Ints) -> None:
        """These may start, and so may those behind them that waited for nothing else."""
        allowed = [ready]
        while len(ready):
            behind = self.messages.behind[ready]
            behind = behind[behind >= 0]
            self.waits[behind] -= 1
            ready = behind[self.waits[behind] == 0]
            allowed.append(ready)
        self._enqueue(np.sort(np.concatenate(allowed)))

    def _enqueue(self, ready: Ints) -> None:
        """Messages, in the order of steps, join the queues of their pairs."""
        if not len(ready):
            return
        pair = self.messages.pair[ready]
        order = np.argsort(pair, kind="stable")
        ready, pair = ready[order], pair[order]
        opens = np.append(True, pair[1:] != pair[:-1])
        self.next[ready[:-1][~opens[1:]]] = ready[1:][~opens[1:]]
        firsts, queues = ready[opens], pair[opens]
        idle = self.head[queues] < 0
        self.head[queues[idle]] = firsts[idle]
        self.left[queues[idle]] = self.nbytes[firsts[idle]]
        self.next[self.tail[queues[~idle]]] = firsts[~idle]
        self.tail[queues] = ready[np.append(opens[1:], True)]
