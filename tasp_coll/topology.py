"""What is connected to what: ranks, switches and directed links, from a preset, a file or by hand.

A `Topology` is a frozen value: checked when it is made, links in one canonical order, equal on every rank
that builds it from the same description. The links of an equal full mesh are implicit (`MeshLinks`), so that
4098 ranks do not cost 16.8 million objects.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from hashlib import blake2b
from numbers import Integral, Real
from pathlib import Path
from typing import Any, overload

from tasp_coll.cutbound import allgather_bound_shares
from tasp_coll.errors import ArgumentError, ArgumentTypeError, TopologyError

Node = int | str  # a rank's number or a switch's name
ENVIRONMENT = "TASP_COLL_TOPOLOGY"


@dataclass(frozen=True, slots=True)
class Link:
    """One directed link from `source` to `target`: `GBps` in 1e9 bytes per second, `latency_us` in 1e-6 s."""

    source: Node
    target: Node
    GBps: float
    latency_us: float = 0.0


@dataclass(frozen=True, eq=False)
class MeshLinks(Sequence[Link]):
    """The n*(n-1) equal links of a full mesh of n ranks, by source then target, each made when asked for."""

    ranks: int
    GBps: float
    latency_us: float = 0.0

    def __post_init__(self) -> None:
        if not _is_count(self.ranks):
            raise TopologyError(f"MeshLinks: ranks must be an integer >= 1, got {self.ranks!r}")
        if fault := _rate_fault(self.GBps, self.latency_us):
            raise TopologyError(f"MeshLinks: {fault[0]} {fault[1]}")
        object.__setattr__(self, "GBps", float(self.GBps))
        object.__setattr__(self, "latency_us", float(self.latency_us) or 0.0)  # -0.0 is 0.0

    def __len__(self) -> int:
        return self.ranks * (self.ranks - 1)

    @overload
    def __getitem__(self, index: int) -> Link: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Link, ...]: ...
    def __getitem__(self, index: int | slice) -> Link | tuple[Link, ...]:
        position = range(len(self))[index]
        if isinstance(position, range):
            return tuple(map(self._link, position))
        return self._link(position)

    def __iter__(self) -> Iterator[Link]:
        return map(self._link, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, MeshLinks):
            return len(self) == len(other) and self[:1] == other[:1]
        if isinstance(other, (tuple, list)):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # equal to a tuple of the same links, whose hash costs O(n^2)

    def _link(self, position: int) -> Link:
        source, k = divmod(position, self.ranks - 1)
        return Link(source, k + (k >= source), self.GBps, self.latency_us)


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
        _check_nodes(self.name, self.ranks, self.switches)
        object.__setattr__(self, "ranks", int(self.ranks))
        object.__setattr__(self, "switches", tuple(self.switches))
        object.__setattr__(self, "links", _canonical(self.ranks, self.switches, self.links))

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
        links = tuple(link for link in self.links if {link.source, link.target} != {a, b})
        return Topology(f"{self.name} without {a}-{b}", self.ranks, self.switches, links)

    def allgather_bound(self, shard_bytes: float) -> float:
        """The cut bound: seconds that an all-gather of `shard_bytes` bytes per rank takes at least."""
        number = _number(shard_bytes)
        if number is None:
            raise ArgumentTypeError(f"shard_bytes must be a number of bytes, got {shard_bytes!r}")
        if not 0 <= number < math.inf:
            raise ArgumentError(f"shard_bytes must be a finite number >= 0, got {shard_bytes!r}")
        return float(self._bound_shares * Fraction(number) / 10**9)

    def link(self, u: Node, v: Node) -> Link | None:
        """The direct link from `u` to `v`, if there is one."""
        if not isinstance(self.links, MeshLinks):
            return self._table.get((u, v))
        both_ranks = u != v and all(_is_node(node, self.ranks, ()) for node in (u, v))
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
            if not _is_node(rank, self.ranks, ()):
                raise ArgumentError(f"{name} must be a rank in 0..{self.ranks - 1}, got {rank!r}")
        if src == dst:
            return ()
        if self.link(src, dst):
            return ((src, dst),)
        if self.is_single_switch:
            return ((src, self.switches[0]), (self.switches[0], dst))
        if via := self._common_switch(src, dst):
            return ((src, via), (via, dst))
        before = self._before(src, through_ranks=False)
        if dst not in before:
            before = self._before(src, through_ranks=True)
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
        return _neighbours((link.source, link.target) for link in self.links)

    @cached_property
    def _number(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate((*range(self.ranks), *sorted(self.switches)))}

    @cached_property
    def _routes(self) -> dict[tuple[int, bool], dict[Node, Node]]:
        return {}

    def _common_switch(self, src: int, dst: int) -> Node | None:
        """The switch between two ranks of which `_before` would tell, without a search; None if there is none."""
        number = self._number
        ways = [
            (-min(self.GBps(src, node), self.GBps(node, dst)), number[node] ^ src, node)
            for node in self._targets[src]
            if isinstance(node, str) and (node, dst) in self._table
        ]
        return min(ways)[2] if ways else None

    def _before(self, src: int, through_ranks: bool) -> dict[Node, Node]:
        """Node before each node on its route from `src`.

        Of equally short and wide routes, the smallest XOR with `src` decides: it spreads an all-to-all evenly over
        the links of hypercubes (e-cube routing) and of square tori of 2^k, where the smallest number would not.
        """
        number = self._number
        if (src, through_ranks) not in self._routes:
            self._routes[src, through_ranks] = _breadth_first(
                self._targets, src, lambda node: number[node] ^ src, through_ranks, self.GBps
            )
        return self._routes[src, through_ranks]


class LinkError(TopologyError):
    """A fault of one link: its index, the field ("" for the whole link) and the rule that it breaks."""

    def __init__(self, index: int, field: str, rule: str) -> None:
        self.index, self.field, self.rule = index, field, rule
        super().__init__(f"links[{index}]{'.' if field else ''}{field} {rule}")


def _is_integer(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and bool(value >= 1)


def _is_node(node: Any, ranks: int, switches: Iterable[str]) -> bool:
    return node in switches if isinstance(node, str) else _is_integer(node) and 0 <= int(node) < ranks


def _number(value: object) -> float | None:
    """`value` as a float, infinite if it is too large for one; None if it is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def order(node: Node) -> tuple[bool, int, str]:
    """Sort key of nodes: ranks by number, then switches by name."""
    return (True, 0, node) if isinstance(node, str) else (False, node, "")


def _rate_fault(GBps: object, latency_us: object) -> tuple[str, str] | None:
    """The field at fault and the rule that it breaks."""
    for name, value, rule in (("GBps", GBps, "> 0"), ("latency_us", latency_us, ">= 0")):
        number = _number(value)
        if number is None:
            return name, f"must be a number, got {value!r}"
        if not 0 <= number < math.inf or (number == 0 and rule == "> 0"):
            return name, f"must be a finite number {rule}, got {value!r}"
    return None


def _check_nodes(name: object, ranks: object, switches: object) -> None:
    if not isinstance(name, str):
        raise TopologyError(f"name must be a string, got {name!r}")
    if not _is_count(ranks):
        raise TopologyError(f"ranks must be an integer >= 1, got {ranks!r}")
    if not isinstance(switches, (tuple, list)):
        raise TopologyError(f"switches must be a list of names, got {switches!r}")
    for i, switch in enumerate(switches):
        if not isinstance(switch, str) or not switch:
            raise TopologyError(f"switches[{i}] must be a name, got {switch!r}")
        if switch in switches[:i]:
            raise TopologyError(f"switches[{i}] must differ from the others, got {switch!r} again")


def _canonical(ranks: int, switches: tuple[str, ...], links: Iterable[Link]) -> Sequence[Link]:
    """The links, checked and in order; a mesh of equal links becomes MeshLinks (which need no check)."""
    if isinstance(links, MeshLinks):
        if links.ranks != ranks:
            raise TopologyError(f"links must mesh the topology's {ranks} ranks, got MeshLinks of {links.ranks}")
        return links if ranks > 1 else ()
    links = tuple(links)
    _check_links(ranks, frozenset(switches), links)
    exact = (
        Link(_plain(link.source), _plain(link.target), float(link.GBps), float(link.latency_us) or 0.0)
        for link in links
    )
    ordered = tuple(sorted(exact, key=lambda link: (order(link.source), order(link.target))))
    _check_connected(ranks, ordered)
    if ranks > 1 and not switches and len(ordered) == ranks * (ranks - 1):
        mesh = MeshLinks(ranks, ordered[0].GBps, ordered[0].latency_us)
        return mesh if mesh == ordered else ordered
    return ordered


def _plain(node: Node) -> Node:
    return node if isinstance(node, str) else int(node)


def _check_links(ranks: int, switches: frozenset[str], links: Sequence[object]) -> None:
    first: dict[tuple[Node, Node], int] = {}
    for i, link in enumerate(links):
        if not isinstance(link, Link):
            raise LinkError(i, "", f"must be a Link, got {link!r}")
        for name, node in (("source", link.source), ("target", link.target)):
            if not _is_node(node, ranks, switches):
                raise LinkError(i, name, f"must be a rank in 0..{ranks - 1} or a switch's name, got {node!r}")
        if link.source == link.target:
            raise LinkError(i, "", f"must join two nodes, got a link from {link.source!r} to itself")
        if fault := _rate_fault(link.GBps, link.latency_us):
            raise LinkError(i, *fault)
        if first.setdefault((link.source, link.target), i) != i:
            ends = f"{link.source!r} to {link.target!r}"
            raise LinkError(i, "", f"is a second link from {ends}: give one with the rates added up")


def _check_connected(ranks: int, links: Sequence[Link]) -> None:
    ahead = _breadth_first(_neighbours((link.source, link.target) for link in links), 0, order, True)
    back = _breadth_first(_neighbours((link.target, link.source) for link in links), 0, order, True)
    for rank in range(1, ranks):
        if rank not in ahead or rank not in back:
            src, dst = (0, rank) if rank not in ahead else (rank, 0)
            raise TopologyError(f"links must connect every rank to every other, but none lead from {src} to {dst}")


def _neighbours(arcs: Iterable[tuple[Node, Node]]) -> dict[Node, list[Node]]:
    table: dict[Node, list[Node]] = {}
    for u, v in arcs:
        table.setdefault(u, []).append(v)
    return table


def _breadth_first(
    targets: Mapping[Node, Sequence[Node]],
    src: int,
    key: Callable[[Node], Any],
    through_ranks: bool,
    rate: Callable[[Node, Node], float] = lambda u, v: 1.0,
) -> dict[Node, Node]:
    """The node before each node on its fewest-hop route from `src`, of several the widest, then of smallest key."""
    before: dict[Node, Node] = {src: src}
    width: dict[Node, float] = {src: math.inf}
    reached: list[Node] = [src]
    while reached:
        ordered = sorted(reached, key=key)
        found: dict[Node, tuple[float, Node]] = {}
        for node in ordered:
            if through_ranks or node == src or isinstance(node, str):
                for target in targets.get(node, ()):
                    wide = min(width[node], rate(node, target))
                    if target not in width and wide > found.get(target, (0.0,))[0]:
                        found[target] = wide, node
        before |= {target: node for target, (_, node) in found.items()}
        width |= {target: wide for target, (wide, _) in found.items()}
        reached = list(found)
    return before


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
