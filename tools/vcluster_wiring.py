"""What a virtual cluster is made of: cables between network namespaces, their shapers, addresses and routes.

Nothing here touches the machine. A rank is a namespace with an address; so is a switch that is linked to another
switch, because its packets need routes. Any other switch is a namespace with a bridge. Every link between two nodes is
a veth pair ("cable"), and each of its ends ("port") is shaped to the rate of the link that leaves there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from tasp_coll import ArgumentError, Link, Topology
from tasp_coll.links import Node, order

RANK_DEVICE = "rank"  # carries a host's address; MPI is told to use it
BRIDGE_DEVICE = "bridge"
ETHERNET_BYTES = 14  # counted by shapers, not by the MTU
TCP_BYTES = 52  # IP and TCP headers with timestamps
SMALLEST_MTU, LARGEST_MTU = 1280, 65000
FASTEST_MBIT = 100_000
MOST_HOSTS = 4096
_LEAST_QUEUE = 4 << 16  # TCP hands over up to 64 KiB at a time, some of them before it hears of a loss
_TABLE = 1000  # + a rank: the routes of what that rank sends, where others forward it


def checked(topology: Topology) -> Topology:
    """The topology, if it has not more hosts than can be; else ArgumentError."""
    if (hosts := topology.ranks + len(topology.switches)) > MOST_HOSTS:
        raise ArgumentError(f"--topology must have {MOST_HOSTS} ranks and switches at most, got {hosts}")
    return topology


@dataclass(frozen=True)
class Settings:
    """How fast and how the links are. `link_mbit`: nominal rate of the fastest link; `mtu`: largest IP packet.

    burst_ms: what a link that was idle may send at once, as time of that link, two packets at least. queue_ms: how
    long a packet may wait for its link, 256 KiB at least; more are dropped. latency_scale: factor for `latency_us`.
    """

    link_mbit: float
    mtu: int
    burst_ms: float = 5.0
    queue_ms: float = 50.0
    latency_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("link_mbit", 0.01, FASTEST_MBIT),
            ("mtu", SMALLEST_MTU, LARGEST_MTU),
            ("burst_ms", 0, 1e4),
            ("queue_ms", 0, 1e4),
            ("latency_scale", 0, 1e9),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise ArgumentError(f"{name} must be in {low:g}..{high:g}, got {value!r}")

    @staticmethod
    def suited_mtu(topology: Topology, link_mbit: float) -> int:
        """Packets that grow with the rate of the links, to about 1.3 ms each: cores pay by the packet.

        Smaller than 4000 bytes they burden two cores even at 10 Mbit/s. Between fast and slow links their mean decides.
        """
        rates = [link.GBps for link in topology.links] or [1.0]
        mean_mbit = link_mbit * math.sqrt(min(rates) / max(rates))
        return round(min(max(160 * mean_mbit, 4000), 60000))

    @property
    def payload(self) -> float:
        """Bytes of TCP payload per byte that a shaper counts, in full packets."""
        return (self.mtu - TCP_BYTES) / (self.mtu + ETHERNET_BYTES)


@dataclass(frozen=True)
class Port:
    """One end of a cable: the device in `node`'s namespace, and the shaping of what leaves through it."""

    node: Node
    peer: Node
    namespace: str
    device: str
    mac: str
    rate_bit: int
    latency_us: float
    carries: bool  # False: the topology has no link in this direction, so no route leads here


class Route(NamedTuple):
    """At `node`, packets to rank `dst` (where `src` is set: those that rank `src` sent) leave by `device` for `via`."""

    node: Node
    src: int | None
    dst: int
    via: Node
    device: str


@dataclass(frozen=True)
class Wiring:
    """All of a virtual cluster: what `topology` is built of at `settings`."""

    topology: Topology
    settings: Settings

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Ranks, then switches."""
        return (*range(self.topology.ranks), *self.topology.switches)

    @cached_property
    def bridges(self) -> frozenset[str]:
        """Switches that are bridges: those that have no other switch beside them."""
        links = [(link.source, link.target) for link in self.topology.links]
        joined = {node for ends in links if all(isinstance(end, str) for end in ends) for node in ends}
        return frozenset(self.topology.switches) - joined

    @cached_property
    def cables(self) -> tuple[tuple[Port, Port], ...]:
        """A cable for each two nodes with a link, its ends in the order of the nodes."""
        pairs = {tuple(sorted((link.source, link.target), key=order)) for link in self.topology.links}
        ordered = sorted(pairs, key=lambda pair: (order(pair[0]), order(pair[1])))
        return tuple((self._port(u, v), self._port(v, u)) for u, v in ordered)

    @cached_property
    def ports(self) -> dict[tuple[Node, Node], Port]:
        """The port at u of the cable to v, by (u, v)."""
        return {(port.node, port.peer): port for cable in self.cables for port in cable}

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        """Routes that take every packet along `Topology.path` of the rank that sent it and the rank it goes to."""
        found: dict[Route, None] = {}
        for src in range(self.topology.ranks):
            for dst in range(self.topology.ranks):
                stops = self._stops(src, dst)
                for (node, (_, first)), (via, _) in pairwise(stops):
                    device = self.ports[node, first].device
                    found[Route(node, None if node == src else src, dst, via, device)] = None
        return tuple(found)

    @cached_property
    def forwards(self) -> frozenset[Node]:
        """Nodes that pass packets on."""
        return frozenset(route.node for route in self.routes if route.src is not None)

    def namespace(self, node: Node) -> str:
        """Name of a node's network namespace."""
        return f"s{self.topology.switches.index(node)}" if isinstance(node, str) else f"r{node}"

    def address(self, node: Node) -> str:
        """IPv4 address of a rank, or of a switch that forwards."""
        number = self._number(node) + 1
        return f"10.{77 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"

    def rate_bit(self, GBps: float) -> int:
        """Shaped rate of a link of the topology, in bit/s."""
        return max(round(self.settings.link_mbit * 1e6 * GBps / self._fastest), 1000)

    def delivered(self, goodput: dict[float, float]) -> Topology:
        """The topology with the rates that its links really have: `goodput` in GB/s of each nominal GBps."""
        links = tuple(
            Link(link.source, link.target, goodput[link.GBps], link.latency_us * self.settings.latency_scale)
            for link in self.topology.links
        )
        name = f"{self.topology.name}, links up to {self.settings.link_mbit:g} Mbit/s"
        return Topology(name, self.topology.ranks, self.topology.switches, links)

    # --- what ip and tc are told

    def namespaces(self) -> list[str]:
        """Lines of `ip -batch` that make the namespaces."""
        return [f"netns add {self.namespace(node)}" for node in self.nodes]

    def plugging(self) -> list[str]:
        """Lines of `ip -batch` that make the cables."""
        mtu = self.settings.mtu
        return [
            f"link add name {a.device} address {a.mac} mtu {mtu} netns {a.namespace} "
            f"type veth peer name {b.device} address {b.mac} mtu {mtu} netns {b.namespace}"
            for a, b in self.cables
        ]

    def interfaces(self, node: Node) -> list[str]:
        """Lines of `ip -batch`, in the node's namespace, that set up its devices, addresses, neighbours and routes."""
        lines = ["link set lo up"]
        devices = list(self._devices[node])
        if node in self.bridges:
            lines += [f"link add name {BRIDGE_DEVICE} mtu {self.settings.mtu} type bridge mcast_snooping 0"]
            for device in devices:
                lines += [f"link set {device} master {BRIDGE_DEVICE} up"]
                lines += [f"link set {device} type bridge_slave learning off flood off"]
            return [*lines, f"link set {BRIDGE_DEVICE} up"]
        # A pair of its own, as the kernel may lack type dummy, and MPI refuses lo.
        lines += [f"link add name {RANK_DEVICE} type veth peer name {RANK_DEVICE}-peer"]
        lines += [f"link set {RANK_DEVICE} up", f"link set {RANK_DEVICE}-peer up"]
        lines += [f"address add {self.address(node)}/32 dev {RANK_DEVICE}"]
        lines += [f"link set {device} up" for device in devices]
        return lines + self._routing(node)

    def stations(self, switch: str) -> list[str]:
        """Lines of `bridge -batch`, in a bridge's namespace: who is behind which port, with nothing to be learnt.

        A bridge sends to all ports what goes to a rank that it has not heard, and replies may take other ways.
        """
        ports = [port for (_, peer), port in self.ports.items() if peer == switch and switch in self.bridges]
        return [f"fdb add {port.mac} dev {port.namespace} master static" for port in ports]

    def shapers(self, node: Node) -> list[str]:
        """Lines of `tc -batch`, in the node's namespace, that shape what leaves the node."""
        return [self.shaper(port) for port in self._devices[node].values()]

    def shaper(self, port: Port, slower: float = 1.0, verb: str = "add") -> str:
        """Shape a port to its rate, or to a `slower`-th of it."""
        rate = max(round(port.rate_bit / slower), 1000)
        return (
            f"qdisc {verb} dev {port.device} root handle 1: tbf rate {rate}bit "
            f"burst {self.burst_bytes(rate)} limit {self.queue_bytes(port)}"
        )

    def delay(self, port: Port, delay_us: float, jitter_us: float = 0.0) -> str:
        """Let what leaves a port be under way for so long, by netem. With a rate, of any height, it keeps the order."""
        flying = port.rate_bit * (delay_us + jitter_us) / 8e6 + self.queue_bytes(port)
        packets = math.ceil(flying / self.settings.mtu) + 100
        jitter = f" {jitter_us:.3f}us rate 100gbit" if jitter_us else ""
        child = f"qdisc replace dev {port.device} parent 1:1 handle 20:"
        return f"{child} netem delay {delay_us:.3f}us{jitter} limit {packets}"

    def queue_bytes(self, port: Port) -> int:
        """Bytes that may wait for a link."""
        return round(max(port.rate_bit * self.settings.queue_ms / 8e3, _LEAST_QUEUE)) + self.burst_bytes(port.rate_bit)

    def burst_bytes(self, rate_bit: int) -> int:
        """Bytes that a link of this rate may send at once after it was idle. With one packet a shaper that is woken
        late would fall behind for good."""
        return max(round(rate_bit * self.settings.burst_ms / 8e3), 2 * (self.settings.mtu + ETHERNET_BYTES))

    def _routing(self, node: Node) -> list[str]:
        mine = self._routes_at.get(node, [])
        neighbours = {(route.via, route.device): self._mac(route) for route in mine}
        lines = [f"neigh add {self.address(via)} lladdr {mac} dev {dev}" for (via, dev), mac in neighbours.items()]
        lines += [
            f"rule add pref 100 from {self.address(src)} lookup {_TABLE + src}"
            for src in sorted({route.src for route in mine if route.src is not None})
        ]
        for route in mine:
            table = f"src {self.address(node)}" if route.src is None else f"table {_TABLE + route.src}"
            hop = f"via {self.address(route.via)} dev {route.device} onlink"
            lines.append(f"route add {self.address(route.dst)}/32 {hop} {table}")
        return lines

    def _mac(self, route: Route) -> str:
        """The next hop's port: the other end of the cable, or the one beyond the bridge."""
        ahead = self._devices[route.node][route.device].peer
        return self.ports[route.via, route.node if ahead == route.via else ahead].mac

    def _stops(self, src: int, dst: int) -> list[tuple[Node, tuple[Node, Node]]]:
        """Nodes with routes on the way, each with the link by which packets leave it (the last with none)."""
        path = self.topology.path(src, dst)
        stops = [(u, (u, v)) for u, v in path if u not in self.bridges]
        return [*stops, (dst, (dst, dst))]

    @cached_property
    def _devices(self) -> dict[Node, dict[str, Port]]:
        found: dict[Node, dict[str, Port]] = {node: {} for node in self.nodes}
        for port in self.ports.values():
            found[port.node][port.device] = port
        return found

    @cached_property
    def _routes_at(self) -> dict[Node, list[Route]]:
        found: dict[Node, list[Route]] = {}
        for route in self.routes:
            found.setdefault(route.node, []).append(route)
        return found

    @cached_property
    def _fastest(self) -> float:
        return max((link.GBps for link in self.topology.links), default=1.0)

    @cached_property
    def _numbers(self) -> dict[Node, int]:
        return {node: number for number, node in enumerate(self.nodes)}

    def _number(self, node: Node) -> int:
        return self._numbers[node]

    def _port(self, u: Node, v: Node) -> Port:
        link, back = self.topology.link(u, v), self.topology.link(v, u)
        shaped = link or back
        assert shaped is not None
        mac = "02:00:" + (self._number(u).to_bytes(2, "big") + self._number(v).to_bytes(2, "big")).hex(":")
        latency = shaped.latency_us * self.settings.latency_scale
        return Port(u, v, self.namespace(u), self.namespace(v), mac, self.rate_bit(shaped.GBps), latency, bool(link))
