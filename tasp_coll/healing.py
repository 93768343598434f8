"""Links that are dead or slow: what ranks saw of them, agreed at the end of a call, becomes the topology to plan for.

A dead link is known to both its ends and left out. A slow one shows in how long its messages took, as a share of what
the topology says, against the usual share of all links: where all are slow, because cores or a protocol are, nothing
is to be gained by other weights. Rates only go down: a link that has been slow is not trusted again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from itertools import combinations
from statistics import median

from tasp_coll.agreement import Rounds
from tasp_coll.bootstrap import exchange_texts
from tasp_coll.errors import LinkWarning, TopologyError
from tasp_coll.links import Node
from tasp_coll.ring_solver import load
from tasp_coll.topology import Topology
from tasp_coll.transport.healing import HealingTransport
from tasp_coll.transport.rates import Sample
from tasp_coll.transport.relay import Pair

SLOW = 0.4  # of the usual share, below which a link is slow
_CAUTION = 0.85  # a chunk too small for its link costs little, one too large holds up its ring
_NOTICEABLE_SECONDS = 0.01  # a message that takes less tells more of who had the core than of the link
_LEAST_PAIRS, _LEAST_MESSAGES = 3, 6
Arc = tuple[Node, Node]


class Healer:
    """The agreement that closes each call, and the topology that comes of it, the same on all ranks."""

    def __init__(
        self,
        transport: HealingTransport,
        rounds: Rounds,
        topology: Topology,
        adopt: Callable[[Topology], None],
        streaming: Callable[[], bool],
    ) -> None:
        """adopt: is given each new topology. streaming: whether a stream is open, beside which others may be opened
        that must have its plan."""
        load()  # in need, all would wait for the slowest to do so
        self._transport, self._rounds, self._adopt, self._streaming = transport, rounds, adopt, streaming
        self._whole = self._now = topology
        self._dead: list[Pair] = []  # what plans do without
        self._met: set[Pair] = set()  # these, and those without which there is no plan
        self._rates: dict[Arc, float] = {}
        self._samples: dict[Pair, Sample] = {}

    def settle(self) -> Generator[bool, None, None]:
        """Tell each other what was seen since the last time."""
        samples = self._transport.take_samples()
        told = _told(self._streaming(), sorted(self._transport.dead), samples, self._rounds.capacity)
        texts = yield from exchange_texts(self._rounds, told)
        seen = [json.loads(text) for text in texts]
        dead = {(a, b) for each in seen for a, b in each["dead"]}
        self._transport.avoid(dead)
        for rank, each in enumerate(seen):
            self._samples |= {(rank, sample[0]): Sample(*sample) for sample in each["rates"]}
        if any(each["streaming"] for each in seen):  # what is dead is avoided, and planned without later
            return
        fresh = self._exclude(sorted(dead)) + self._reweight()
        if fresh:
            self._samples.clear()
            self._transport.forget_samples()
            self._adopt(self._now)
            for what in fresh:
                warnings.warn(f"{what}; plans are now for {self._now.name!r}", LinkWarning, stacklevel=2)

    def _exclude(self, dead: Iterable[Pair]) -> list[str]:
        """Leave out links that died; what to say of them."""
        told = []
        for a, b in dead:
            if (a, b) in self._met or not _linked(self._whole, a, b):
                continue
            self._met.add((a, b))
            try:
                self._now = self._planned([*self._dead, (a, b)])
                self._dead.append((a, b))
                told.append(f"ranks {a} and {b} do not reach each other any more: their link is left out")
            except TopologyError as error:
                told.append(f"ranks {a} and {b} do not reach each other any more, and nothing leads around: {error}")
        return told

    def _reweight(self) -> list[str]:
        """Lower the rates of slow links; what to say of them."""
        slow = slow_links(self._now, self._samples)
        for (u, v), share in slow.items():
            self._rates[u, v] = float(f"{self._now.GBps(u, v) * share * _CAUTION:.3g}")
        if slow:
            self._now = self._planned(self._dead)
        return [f"the link from {u} to {v} delivers {share:.2g} of what is usual" for (u, v), share in slow.items()]

    def _planned(self, dead: Iterable[Pair]) -> Topology:
        """What is left of the whole topology. TopologyError: too little."""
        left = self._whole
        for a, b in dead:
            left = left.without_link(a, b)
        return left.with_rates({arc: rate for arc, rate in self._rates.items() if left.link(*arc) is not None})


def slow_links(topology: Topology, samples: Mapping[Pair, Sample]) -> dict[Arc, float]:
    """The directed links that are slow, with the share of the usual rate that they deliver.

    samples: of messages, by sending and receiving rank. A link is as fast as the fastest pair whose messages cross it.
    """
    paths = {pair: topology.path(*pair) for pair in samples}
    nominal = {pair: 1e9 * min(topology.GBps(u, v) for u, v in path) for pair, path in paths.items()}
    held = {pair: sample.nbytes / sample.seconds / nominal[pair] for pair, sample in samples.items()}
    if len(held) < _LEAST_PAIRS:
        return {}
    usual = median(held.values())
    crossing: dict[Arc, list[Pair]] = {}
    for pair, path in paths.items():
        for arc in path:
            crossing.setdefault(arc, []).append(pair)
    found = {}
    for arc, pairs in crossing.items():
        seen = [samples[pair] for pair in pairs]
        known = sum(sample.messages for sample in seen) >= _LEAST_MESSAGES
        noticeable = all(sample.quickest > _NOTICEABLE_SECONDS for sample in seen)
        if known and noticeable and max(samples[pair].best / nominal[pair] for pair in pairs) < SLOW * usual:
            found[arc] = max(held[pair] for pair in pairs) / usual
    return found


def derived_pairs(topology: Topology) -> Callable[[Pair], Iterable[Pair]]:
    """For a pair of ranks: the pairs whose traffic crosses the link between them, itself included."""

    def of(pair: Pair) -> Iterable[Pair]:
        a, b = pair
        if topology.is_full_mesh or not _linked(topology, a, b):
            return [pair]
        ways = {(a, b), (b, a)}
        every = combinations(range(topology.ranks), 2)
        return [(c, d) for c, d in every if ways & {*topology.path(c, d), *topology.path(d, c)}]

    return of


def _linked(topology: Topology, a: int, b: int) -> bool:
    return topology.link(a, b) is not None or topology.link(b, a) is not None


def _told(streaming: bool, dead: Sequence[Pair], samples: Sequence[Sample], limit: int) -> str:
    """As text of at most `limit` bytes: of many links the slowest are told."""
    rates = sorted(samples, key=lambda sample: sample.best)
    while len(text := json.dumps({"streaming": streaming, "dead": dead, "rates": rates})) > limit and rates:
        rates = rates[: len(rates) // 2]
    return text
