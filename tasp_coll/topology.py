"""What is connected to what: ranks, switches and directed links, from a preset, a file or by hand.

A `Topology` is a frozen value: checked when it is made, links in one canonical order, equal on every rank
that builds it from the same description. The links of an equal full mesh are implicit (`MeshLinks`), so that
4098 ranks do not cost 16.8 million objects.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tasp_coll.cutbound import allgather_bound_shares
from tasp_coll.errors import ArgumentError, ArgumentTypeError, TopologyError
from tasp_coll.links import Link, MeshLinks, Node, breadth_first, canonical, check_nodes, is_node, neighbours, number_of

ENVIRONMENT = "TASP_COLL_TOPOLOGY"
_MOST_LISTED = 1 << 25  # of a mesh that are listed one by one, once one of them differs


@dataclass(frozen=True)
class Topology:
    """`ranks` ranks numbered from 0, named `switches`, and directed `links` between them.

    Links are kept sorted (ranks before switches); a mesh of equal links is kept as `MeshLinks`. At most one
    link runs from one node to another, and every rank must reach every other: TopologyError names the entry
    at fault.

    >>> Topology.preset("full_mesh:8").without_link(0, 1).allgather_bound(6_000_000_000)
    7.0
    """

    name: str
    ranks: int
    switches: tuple[str, ...] = ()
    links: Sequence[Link] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_nodes(self.name, self.ranks, self.switches)
        object.__setattr__(self, "ranks", int(self.ranks))
        object.__setattr__(self, "switches", tuple(self.switches))
        object.__setattr__(self, "links", canonical(self.ranks, self.switches, self.links))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @staticmethod
    def preset(spec: str) -> Topology:
        """The topology that `spec` names, such as "full_mesh:8"; `presets.KNOWN_SPECS` lists the forms."""
        from tasp_coll.presets import preset  # presets builds Topologies, so it imports this module

        return preset(spec)

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Topology:
        """Read a topology file (JSON); TopologyError names the file and the entry at fault.

        {"name", "ranks": N, "switches": ["s0"],
         "links": [{"from": 0, "to": 1, "GBps": 64, "latency_us": 1, "duplex": true}]}

        `name` (default: the file's stem), `switches`, `latency_us` (0) and `duplex` (false) may be left out.
        """
        from tasp_coll.topology_file import read

        return read(Path(path))

    @staticmethod
    def discover(comm: Any = None, *, repeats: int = 3) -> Topology:
        """The topology that the ranks of `comm` measure, the same on all of them. Collective.

        comm: a Communicator, or what makes one (None: all ranks of MPI). repeats: of which medians are taken. Pairwise
        and concurrent bandwidth tell a full mesh, one switch, or several equal nodes of either kind; TopologyError on
        every rank if none of these explains them. The rates are what messages of this transport get.
        """
        from tasp_coll.probe import discover

        return discover(comm, repeats=repeats)

    @staticmethod
    def resolve(value: Topology | str | os.PathLike[str] | None, ranks: int) -> Topology:
        """The topology that a caller means by `value`, which must have `ranks` ranks (else TopologyError).

        A Topology stands for itself; a string is a preset's spec or else a path; None is what the environment
        variable TASP_COLL_TOPOLOGY names, else a full mesh of equal links of 1 GB/s.
        """
        if value is None:
            if not (named := os.environ.get(ENVIRONMENT)):
                return Topology.preset(f"full_mesh:{ranks}")
            try:
                return Topology.resolve(named, ranks)
            except TopologyError as error:
                raise TopologyError(f"environment variable {ENVIRONMENT}: {error}") from error
        topology = value if isinstance(value, Topology) else read_named(value)
        if topology.ranks != ranks:
            raise TopologyError(f"topology {topology.name!r} has {topology.ranks} ranks, but {ranks} take part")
        return topology

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a topology file that `from_file` reads back equal; readers see all of it or nothing."""
        from tasp_coll.topology_file import write

        write(self, Path(path))

    def without_link(self, a: Node, b: Node) -> Topology:
        """This topology with both directions of the link between nodes `a` and `b` dead.

        TopologyError if there is no such link or if ranks cannot reach each other without it.
        """
        if self.link(a, b) is None and self.link(b, a) is None:
            raise TopologyError(f"topology {self.name!r} has no link between {a!r} and {b!r}")
        if len(self.links) > _MOST_LISTED:
            raise TopologyError(
                f"topology {self.name!r} has {len(self.links)} links: of more than {_MOST_LISTED} none can be left out"
            )
        links = tuple(link for link in self.links if {link.source, link.target} != {a, b})
        return Topology(f"{self.name} without {a}-{b}", self.ranks, self.switches, links)

    def with_rates(self, rates: Mapping[tuple[Node, Node], float]) -> Topology:
        """This topology with other rates, in GB/s, of the directed links (source, target) named.

        TopologyError if there is no such link, or for a rate that is none.
        """
        for ends in rates:
            if self.link(*ends) is None:
                raise TopologyError(f"topology {self.name!r} has no link from {ends[0]!r} to {ends[1]!r}")
        links = (replace(link, GBps=rates.get((link.source, link.target), link.GBps)) for link in self.links)
        told = ", ".join(f"{a}>{b} at {rate:.3g} GB/s" for (a, b), rate in rates.items())
        return Topology(f"{self.name} with {told}" if told else self.name, self.ranks, self.switches, tuple(links))

    def allgather_bound(self, shard_bytes: float) -> float:
        """The cut bound: seconds that an all-gather of `shard_bytes` bytes per rank takes at least."""
        number = number_of(shard_bytes)
        if number is None:
            raise ArgumentTypeError(f"shard_bytes must be a number of bytes, got {shard_bytes!r}")
        if not 0 <= number < math.inf:
            raise ArgumentError(f"shard_bytes must be a finite number >= 0, got {shard_bytes!r}")
        return float(self._bound_shares * Fraction(number) / 10**9)

    def link(self, u: Node, v: Node) -> Link | None:
        """The direct link from `u` to `v`, if there is one."""
        if not isinstance(self.links, MeshLinks):
            return self._table.get((u, v))
        both_ranks = u != v and all(is_node(node, self.ranks, ()) for node in (u, v))
        return Link(u, v, self.links.GBps, self.links.latency_us) if both_ranks else None

    def GBps(self, u: Node, v: Node) -> float:
        """Rate of the direct link from `u` to `v` in GB/s, 0.0 if there is none."""
        link = self.link(u, v)
        return link.GBps if link else 0.0

    def path(self, src: int, dst: int) -> tuple[tuple[Node, Node], ...]:
        """Links that data crosses from rank `src` to rank `dst`: the fewest hops, of these the widest way.

        Other ranks forward only where no route runs through switches alone. Empty for `src` == `dst`.
        """
        for name, rank in (("src", src), ("dst", dst)):
            if not is_node(rank, self.ranks, ()):
                raise ArgumentError(f"{name} must be a rank in 0..{self.ranks - 1}, got {rank!r}")
        if src == dst:
            return ()
        if self.link(src, dst):
            return ((src, dst),)
        if self.is_single_switch:
            return ((src, self.switches[0]), (self.switches[0], dst))
        if via := self._common_switch(src, dst):
            return ((src, via), (via, dst))
        before = self._before(src, dst, through_ranks=False)
        if dst not in before:
            before = self._before(src, dst, through_ranks=True)
        hops: list[tuple[Node, Node]] = []
        node: Node = dst
        while node != src:
            hops.append((before[node], node))
            node = before[node]
        return tuple(reversed(hops))

    @cached_property
    def is_full_mesh(self) -> bool:
        """No switches, and from every rank to every other one link, all of one rate."""
        if self.switches or len(self.links) != self.ranks * (self.ranks - 1):
            return False
        return isinstance(self.links, MeshLinks) or len({link.GBps for link in self.links}) <= 1

    @cached_property
    def is_single_switch(self) -> bool:
        """One switch, every rank linked to and from it, all links of one rate, and no others."""
        if len(self.switches) != 1 or isinstance(self.links, MeshLinks) or len(self.links) != 2 * self.ranks:
            return False
        through = all(isinstance(link.source, str) or isinstance(link.target, str) for link in self.links)
        return through and len({link.GBps for link in self.links}) == 1

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of ranks, switches and links, not the name; the same on any rank and run."""
        digest = blake2b(repr((self.ranks, sorted(self.switches))).encode(), digest_size=16)
        if isinstance(self.links, MeshLinks):
            digest.update(f" mesh {self.links.GBps!r} {self.links.latency_us!r}".encode())
        else:
            for link in self.links:
                digest.update(repr((link.source, link.target, link.GBps, link.latency_us)).encode())
        return digest.hexdigest()

    @cached_property
    def _bound_shares(self) -> Fraction:
        return allgather_bound_shares(self)

    @cached_property
    def _table(self) -> dict[tuple[Node, Node], Link]:
        return {(link.source, link.target): link for link in self.links}

    @cached_property
    def _targets(self) -> dict[Node, list[Node]]:
        return neighbours((link.source, link.target) for link in self.links)

    @cached_property
    def _number(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate((*range(self.ranks), *sorted(self.switches)))}

    @cached_property
    def _routes(self) -> dict[tuple[int, bool], dict[Node, Node]]:
        return {}

    @cached_property
    def _complete(self) -> set[tuple[int, bool]]:
        """The searches of `_routes` that met all nodes."""
        return set()

    def _common_switch(self, src: int, dst: int) -> Node | None:
        """The switch between two ranks of which `_before` would tell, without a search; None if there is none."""
        number = self._number
        ways = [
            (-min(self.GBps(src, node), self.GBps(node, dst)), number[node] ^ src, node)
            for node in self._targets[src]
            if isinstance(node, str) and (node, dst) in self._table
        ]
        return min(ways)[2] if ways else None

    def _before(self, src: int, dst: int, through_ranks: bool) -> dict[Node, Node]:
        """Node before each node on its route from `src`; nodes farther than `dst` may be left out.

        Of equally short and wide routes, the smallest XOR with `src` decides: it spreads an all-to-all evenly over
        the links of hypercubes (e-cube routing) and of square tori of 2^k, where the smallest number would not.
        """
        number, routes = self._number, self._routes
        found = routes.get((src, through_ranks))
        if found is None or (dst not in found and (src, through_ranks) not in self._complete):
            # The first question is answered for those as near; after the second one all are known.
            goal = dst if found is None else None
            if goal is None:
                self._complete.add((src, through_ranks))
            found = routes[src, through_ranks] = breadth_first(
                self._targets, src, lambda node: number[node] ^ src, through_ranks, self.GBps, goal
            )
        return found


def turned(topology: Topology) -> Topology:
    """`topology` with every link the other way round: its all-gather bound is the reduce-scatter bound of the first."""
    if topology.is_full_mesh or topology.is_single_switch:
        return topology
    links = tuple(Link(link.target, link.source, link.GBps, link.latency_us) for link in topology.links)
    return Topology(topology.name, topology.ranks, topology.switches, links)


def read_named(value: object) -> Topology:
    """The topology that a preset's spec or a path of a file names; a spec wins over a file of that name."""
    from tasp_coll.presets import KNOWN_SPECS, is_preset

    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentTypeError(f"topology must be a Topology, a preset's spec, a path or None, got {value!r}")
    if isinstance(value, str) and is_preset(value):
        return Topology.preset(value)
    if isinstance(value, str) and not os.path.exists(value):
        raise TopologyError(f"topology {value!r} is neither a file nor a preset; presets are:\n{KNOWN_SPECS}")
    return Topology.from_file(value)
