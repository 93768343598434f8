"""Measures what the links between ranks give: messages between pairs, from one rank to all, and from all to all.

A rate is that of a train of messages after its first quarter, which takes up start-up costs and whatever a shaper or
a buffer lets through at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasp_coll.agreement import Header
from tasp_coll.collectives import AllReduce
from tasp_coll.communicator import Communicator
from tasp_coll.core import SLOTS, Core
from tasp_coll.discovery import Measured, Rates, infer
from tasp_coll.errors import ArgumentError, CollectiveError
from tasp_coll.executor import Builder, Exchange, Flow, Node, Place, Program
from tasp_coll.options import Options
from tasp_coll.topology import Topology
from tasp_coll.work import Once

_TRAIN = 16  # messages
_AHEAD = 2  # receives posted for each peer
_LEAST, _MOST = 1 << 14, 1 << 22  # bytes of a message
_SECONDS = 0.005  # that a message should take at least, on the slowest way
_LARGER = 16  # times the bytes of the slowest pair that faster pairs get at most
_FEW = 8  # bytes, for latencies
_PINGS = 20
_SIGNATURE = b"probe".ljust(16)
Pairs = tuple[tuple[int, int], ...]  # (source, target), all under way at the same time
Work = tuple[int, Pairs]  # repetition, and the transfers
Progress = Callable[[list[Work]], Iterable[Work]]
Sizes = NDArray[np.int64]


def discover(comm: Any = None, *, repeats: int = 3) -> Topology:
    """The topology that `comm`'s ranks measure; see `Topology.discover`."""
    if isinstance(comm, Communicator):
        return infer(measure(comm, repeats=repeats))
    with Communicator(comm) as own:
        return infer(measure(own, repeats=repeats))


def measure(comm: Communicator, *, repeats: int = 3, progress: Progress = lambda work: work) -> Measured:
    """Bandwidth and latency between all ranks of `comm`; every rank gets the same figures. Collective.

    repeats: how many figures of each kind the median is taken of. progress: wraps each of four lists of what is to be
    done (as a progress bar does). For n ranks about 3n * repeats trains of messages, one after another.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ArgumentError(f"repeats must be an integer >= 1, got {repeats!r}")
    n = comm.size
    sizes = np.full((n, n), _message_bytes(comm))
    everyone = [tuple((a, b) for a in range(n) for b in range(n) if a != b)]
    from_one = [tuple(pair for pair in everyone[0] if pair[0] == source) for source in range(n)]
    duplex = [(*pairs, *((b, a) for a, b in pairs)) for pairs in _matchings(n)]

    def median(plans: list[Pairs], figure: Callable[[Core, Pairs, Sizes], Rates]) -> Rates:
        found = np.zeros((repeats, n, n))
        for again, pairs in progress([(again, pairs) for again in range(repeats) for pairs in plans if pairs]):
            found[again] += figure(comm._core, pairs, sizes)
        return np.median(found, axis=0)

    alone = median(duplex, _alone)
    fast = alone / max(alone[alone > 0].min(initial=np.inf), 1e-9)
    sizes = sizes * np.clip(np.rint(fast), 1, _LARGER).astype(np.int64)  # so that all take about as long
    latency = median(duplex, _latency)
    return Measured(alone, median(from_one, _together), median(everyone, _together), latency)


def _matchings(n: int) -> Iterator[Pairs]:
    """All pairs in the rounds of a tournament, in which each rank meets one other (the circle method)."""
    last = n - 1 + n % 2  # who stays in place; with an odd number of ranks nobody, and its partner rests
    for turn in range(last):
        met = [(turn, last), *(((turn + k) % last, (turn - k) % last) for k in range(1, (last + 1) // 2))]
        yield tuple((a, b) for a, b in met if max(a, b) < n)


def _message_bytes(comm: Communicator) -> int:
    """Long enough messages for the slowest way from a rank to the next."""
    n, nbytes = comm.size, _LEAST
    ahead = tuple((rank, (rank + 1) % n) for rank in range(n)) if n > 1 else ()
    while nbytes < _MOST:
        rates = _alone(comm._core, ahead, np.full((n, n), nbytes))
        if nbytes >= _SECONDS * 1e9 * rates[rates > 0].min(initial=np.inf):
            break
        nbytes *= 4
    return nbytes


def _alone(core: Core, pairs: Pairs, sizes: Sizes) -> Rates:
    """GB/s of pairs that do not disturb each other, seen from the second quarter of each train on.

    But no more than from the start: a rank that was not running when the first messages came saw them late.
    """
    rates, skipped = np.zeros(sizes.shape), _TRAIN // 4
    for pair, seen in _trains(core, pairs, sizes).items():
        seconds = (seen[-1] - seen[skipped]) / (_TRAIN - 1 - skipped), seen[-1] / _TRAIN
        rates[pair] = sizes[pair] / max(*seconds, 1e-9) / 1e9
    return rates


def _together(core: Core, pairs: Pairs, sizes: Sizes) -> Rates:
    """GB/s of pairs while all of them are busy: what had arrived when the first of them had all."""
    rates, trains = np.zeros(sizes.shape), _trains(core, pairs, sizes)
    end = min(seen[-1] for seen in trains.values())
    for pair, seen in trains.items():
        arrived = np.interp(end, [0.0, *seen], np.arange(_TRAIN + 1) * sizes[pair])
        rates[pair] = arrived / max(end, 1e-9) / 1e9
    return rates


def _trains(core: Core, pairs: Pairs, sizes: Sizes) -> dict[tuple[int, int], Rates]:
    """Seconds from the start at which each message arrived, of all pairs. sizes: bytes of a message of each pair."""
    me, builder = core.rank, Builder()
    for source, target in pairs:
        if source == me:
            for number in range(_TRAIN):
                builder.add(Node(number, target, 0, True, Place("send", 0, int(sizes[me, target]))))
    seen: dict[int, list[float]] = {source: [] for source, target in pairs if target == me}
    room = int(sizes[:, me].max())
    for index, (source, times) in enumerate(seen.items()):
        posted: list[int] = []
        for number in range(_TRAIN):
            place = Place("recv", (index * _AHEAD + number % _AHEAD) * room, int(sizes[source, me]))
            after = posted[-_AHEAD : 1 - _AHEAD] if len(posted) >= _AHEAD else ()
            posted.append(builder.add(Node(number, source, 0, False, place, _stamp(times)), after))
    began = _run(core, builder.build(), int(sizes[me].max()), len(seen) * _AHEAD * room)
    return _shared(core, pairs, {source: np.subtract(times, began) for source, times in seen.items()}, _TRAIN)


def _latency(core: Core, pairs: Pairs, sizes: Sizes) -> Rates:
    """Microseconds of a small message, one way, between partners: half a round trip, of many in a row."""
    me, builder, seen = core.rank, Builder(), dict[int, list[float]]()
    for peer in (source for source, target in pairs if target == me):
        last: list[int] = []
        times = seen[peer] = []
        for number in range(_PINGS):
            for send in (True, False) if me < peer else (False, True):
                place = Place("send" if send else "recv", 0, _FEW)
                last = [builder.add(Node(number, peer, 0, send, place, None if send else _stamp(times)), last)]
    _run(core, builder.build(), _FEW, _FEW)
    found = np.zeros(sizes.shape)
    trips = _shared(core, pairs, {peer: np.diff(times) for peer, times in seen.items()}, _PINGS - 1)
    for pair, taken in trips.items():
        found[pair] = np.median(taken) / 2 * 1e6
    return found


def _shared(core: Core, pairs: Pairs, mine: dict[int, Rates], count: int) -> dict[tuple[int, int], Rates]:
    """What every target took, `count` figures for each source: told to all."""
    table = np.zeros((core.size, core.size, count))
    for source, figures in mine.items():
        table[source, core.rank] = figures
    table = core.engine.run(AllReduce(core, table, None, Options("direct")))
    return {pair: table[pair] for pair in pairs}


def _stamp(seen: list[float]) -> Callable[[Exchange], None]:
    return lambda _: seen.append(time.perf_counter())


def _run(core: Core, program: Program, send_bytes: int, recv_bytes: int) -> float:
    """Carry out a program; when it began."""
    send, recv = np.ones(send_bytes, np.uint8), np.ones(max(recv_bytes, 1), np.uint8)
    bases = {"send": send.ctypes.data, "recv": recv.ctypes.data}
    exchange = Exchange(program, core.transport, bases, 0, SLOTS)
    began: float = core.engine.run(_Probe(core, exchange, (send, recv)))
    exchange.free()
    return began


@dataclass
class _Probe(Once):
    """The operation that carries out one plan, begun by all ranks together."""

    core: Core
    exchange: Exchange
    memory: tuple[Any, ...]  # alive as long as messages may touch it
    name = "discover"
    phase = "measuring links"
    flow: Flow | None = None

    def pending(self) -> tuple[set[int], int | None]:
        """Who is waited for."""
        return self.flow.pending() if self.flow is not None else (self.core.rounds.pending(), None)

    def run(self) -> Generator[bool, None, float]:
        """A round, so that all begin at about the same time, then the messages; when they began."""
        rounds = self.core.rounds
        rounds.post(Header(_SIGNATURE).packed())
        while not rounds.poll():
            yield False
        if not rounds.same(_SIGNATURE):
            raise CollectiveError("ranks disagree on the call: some measure links, others do not")
        began = time.perf_counter()
        self.flow = Flow(self.exchange)
        while not self.flow.done:
            yield self.flow.poll()
        return began
