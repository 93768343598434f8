"""Links between nodes: the values, the rules that they keep, and the ways that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, overload

from tasp_coll.errors import TopologyError

Node = int | str  # a rank's number or a switch's name
LEAST, MOST = 1e-12, 1e12  # of rates and latencies that are not 0: times that follow from them are numbers too


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
        if not is_count(self.ranks):
            raise TopologyError(f"MeshLinks: ranks must be an integer >= 1, got {self.ranks!r}")
        if fault := rate_fault(self.GBps, self.latency_us):
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


class LinkError(TopologyError):
    """A fault of one link: its index, the field ("" for the whole link) and the rule that it breaks."""

    def __init__(self, index: int, field: str, rule: str) -> None:
        self.index, self.field, self.rule = index, field, rule
        super().__init__(f"links[{index}]{'.' if field else ''}{field} {rule}")


def is_integer(value: object) -> bool:
    """Whether it is an integer of any kind, but no bool."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def is_count(value: Any) -> bool:
    """Whether it is an integer of at least 1."""
    return is_integer(value) and bool(value >= 1)


def is_node(node: Any, ranks: int, switches: Iterable[str]) -> bool:
    """Whether it is a rank below `ranks` or one of the switches."""
    return node in switches if isinstance(node, str) else is_integer(node) and 0 <= int(node) < ranks


def number_of(value: object) -> float | None:
    """`value` as a float, infinite if it is too large for one; None if it is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def is_share(value: object) -> bool:
    """Whether it is a finite number of at least 0."""
    return (found := number_of(value)) is not None and 0 <= found < math.inf


def order(node: Node) -> tuple[bool, int, str]:
    """Sort key of nodes: ranks by number, then switches by name."""
    return (True, 0, node) if isinstance(node, str) else (False, node, "")


def rate_fault(GBps: object, latency_us: object) -> tuple[str, str] | None:
    """The field at fault and the rule that it breaks."""
    for name, value, rule in (("GBps", GBps, "> 0"), ("latency_us", latency_us, ">= 0")):
        number = number_of(value)
        if number is None:
            return name, f"must be a number, got {value!r}"
        if not 0 <= number < math.inf or (number == 0 and rule == "> 0"):
            return name, f"must be a finite number {rule}, got {value!r}"
        if number and not LEAST <= number <= MOST:
            return name, f"must be in {LEAST:g}..{MOST:g}, got {value!r}"
    return None


def check_nodes(name: object, ranks: object, switches: object) -> None:
    """TopologyError for a bad name, number of ranks or list of switches."""
    if not isinstance(name, str) or not _is_text(name):
        raise TopologyError(f"name must be a string of whole characters, got {name!r}")
    if not is_count(ranks):
        raise TopologyError(f"ranks must be an integer >= 1, got {ranks!r}")
    if not isinstance(switches, (tuple, list)):
        raise TopologyError(f"switches must be a list of names, got {switches!r}")
    for i, switch in enumerate(switches):
        if not isinstance(switch, str) or not switch or not _is_text(switch):
            raise TopologyError(f"switches[{i}] must be a name, got {switch!r}")
        if switch in switches[:i]:
            raise TopologyError(f"switches[{i}] must differ from the others, got {switch!r} again")


def _is_text(name: str) -> bool:
    """Whether it can be written: JSON may hold halves of characters."""
    return not any("\ud800" <= sign <= "\udfff" for sign in name)


def canonical(ranks: int, switches: tuple[str, ...], links: Iterable[Link]) -> Sequence[Link]:
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
            if not is_node(node, ranks, switches):
                raise LinkError(i, name, f"must be a rank in 0..{ranks - 1} or a switch's name, got {node!r}")
        if link.source == link.target:
            raise LinkError(i, "", f"must join two nodes, got a link from {link.source!r} to itself")
        if fault := rate_fault(link.GBps, link.latency_us):
            raise LinkError(i, *fault)
        if first.setdefault((link.source, link.target), i) != i:
            ends = f"{link.source!r} to {link.target!r}"
            raise LinkError(i, "", f"is a second link from {ends}: give one with the rates added up")


def _check_connected(ranks: int, links: Sequence[Link]) -> None:
    ahead = breadth_first(neighbours((link.source, link.target) for link in links), 0, order, True)
    back = breadth_first(neighbours((link.target, link.source) for link in links), 0, order, True)
    for rank in range(1, ranks):
        if rank not in ahead or rank not in back:
            src, dst = (0, rank) if rank not in ahead else (rank, 0)
            raise TopologyError(f"links must connect every rank to every other, but none lead from {src} to {dst}")


def neighbours(arcs: Iterable[tuple[Node, Node]]) -> dict[Node, list[Node]]:
    """The heads of the arcs that leave each node."""
    table: dict[Node, list[Node]] = {}
    for u, v in arcs:
        table.setdefault(u, []).append(v)
    return table


def breadth_first(
    targets: Mapping[Node, Sequence[Node]],
    src: int,
    key: Callable[[Node], Any],
    through_ranks: bool,
    rate: Callable[[Node, Node], float] = lambda u, v: 1.0,
    goal: Node | None = None,
) -> dict[Node, Node]:
    """The node before each node on its fewest-hop route from `src`, of several the widest, then of smallest key.

    goal: farther nodes than this one may be left out.
    """
    before: dict[Node, Node] = {src: src}
    width: dict[Node, float] = {src: math.inf}
    reached: list[Node] = [src]
    while reached and goal not in before:
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
