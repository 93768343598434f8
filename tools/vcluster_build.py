"""Builds a virtual cluster in a room, and measures what its links deliver."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from tasp_coll import Topology
from tasp_coll.links import Node
from vcluster_conditions import Condition, impose
from vcluster_room import MissingError, Room, RoomError, python
from vcluster_wiring import Wiring

_INSIDE = Path(__file__).with_name("vcluster_inside.py")
_QUIET = {
    "net/ipv6/conf/all/disable_ipv6": "1",  # its discovery would share the links
    "net/ipv6/conf/default/disable_ipv6": "1",
}
_HOST = {
    # What returns may take another way than what came.
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    # A collective that begins after a pause finds its connections as fast as it left them.
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
    # Allowed on every kernel. BBR, the default of some, slows down again and again to probe: it cost a tenth.
    "net/ipv4/tcp_congestion_control": "reno",
    # Small sends whatever the round trip: with tcp_limit_output_bytes, what waits for a link waits in its socket.
    "net/ipv4/tcp_tso_rtt_log": "0",
}
_SOCKET_PACKETS = 2.5  # of a socket in a link's queue, where they would hold up the acknowledgements that others need
_FORWARDING = {"net/ipv4/ip_forward": "1"}
_SAMPLES = 3  # links measured of each rate
_TOGETHER_MBIT = 200.0  # streams of so much in all do not disturb each other on two cores
_ATTEMPTS, _DISTURBED = 3, 0.003
_SETTLE_S, _WINDOW_S, _WINDOW_PACKETS = 0.25, 0.5, 100


def build(room: Room, wiring: Wiring, kernel: dict[str, str] | None = None) -> None:
    """Make the cluster. kernel: more settings of /proc/sys for every host, by path. MissingError, RoomError."""
    check(room, wiring)
    room.batch("ip", ["link set lo up", *wiring.namespaces()])
    settings = [
        (wiring.namespace(node), path, value)
        for node in wiring.nodes
        for path, value in (_QUIET | _kernel_settings(wiring, node, kernel or {})).items()
    ]
    inside(room, settings=settings)
    room.batch("ip", wiring.plugging())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda node: _equip(room, wiring, node), wiring.nodes))
        list(pool.map(lambda ends: _delay(room, wiring, *ends), wiring.ports))


def check(room: Room, wiring: Wiring) -> None:
    """MissingError if this kernel lacks a part that the cluster needs."""
    device = "dev probe0 root handle 1: tbf rate 1000000bit burst 2000 limit 20000"
    steps = [
        ("ip", "link add name probe0 type veth peer name probe1", "pairs of virtual interfaces (CONFIG_VETH, veth)"),
        ("tc", f"qdisc add {device}", "shaping to a rate (CONFIG_NET_SCH_TBF, sch_tbf)"),
    ]
    if wiring.bridges:
        steps.append(("ip", "link add name probe2 type bridge", "bridges (CONFIG_BRIDGE, bridge)"))
    if wiring.forwards:
        rule = "rule add pref 100 from 10.77.0.1 lookup 1000"
        steps.append(("ip", rule, "routing by source (CONFIG_IP_MULTIPLE_TABLES)"))
    for name, line, part in steps:
        try:
            room.batch(name, [line])
        except RoomError as error:
            raise MissingError(f"this kernel has no {part}: '{name} {line}' says: {error}") from error
    for name in ("probe0", "probe2")[: 1 + bool(wiring.bridges)]:
        room.batch("ip", [f"link del {name}"])
    if wiring.forwards:
        room.batch("ip", ["rule del pref 100"])


def inside(room: Room, settings: Sequence[Any] = (), streams: Sequence[Any] = ()) -> Any:
    """Have `vcluster_inside` do a request; its reply."""
    return json.loads(room.call(python(_INSIDE), json.dumps({"settings": settings, "streams": streams})))


def measure(room: Room, wiring: Wiring) -> dict[float, float]:
    """Payload GB/s that links deliver, by their GBps in the topology: one figure for each nominal rate.

    The median of up to three links, each filled by a plain TCP stream between two ranks. A busy machine can only make
    it lower: below what the shaper lets through it is measured again, and the best counts. A rate that no stream can
    fill, because a slower link lies on every way, takes the others' share of the nominal rate.
    """
    shares: dict[float, float] = {}
    for GBps, pairs in _samples(wiring.topology).items():
        for _ in range(_ATTEMPTS):
            shares[GBps] = max(shares.get(GBps, 0.0), _share(room, wiring, pairs, wiring.rate_bit(GBps)))
            if shares[GBps] > wiring.settings.payload * (1 - _DISTURBED):
                break
    rest = median(shares.values()) if shares else 1.0
    nominal = {link.GBps: wiring.rate_bit(link.GBps) / 8e9 for link in wiring.topology.links}
    return {GBps: rate * shares.get(GBps, rest) for GBps, rate in nominal.items()}


def stated(wiring: Wiring, share: float) -> dict[float, float]:
    """The same as `measure`, but a stated share of the nominal rates."""
    return {link.GBps: wiring.rate_bit(link.GBps) / 8e9 * share for link in wiring.topology.links}


def _share(room: Room, wiring: Wiring, pairs: Sequence[tuple[int, int]], rate_bit: int) -> float:
    """Median of the shares of a rate that streams between these ranks get."""
    together = [pairs] if len(pairs) * rate_bit <= _TOGETHER_MBIT * 1e6 else [[pair] for pair in pairs]
    streams = [[_stream(wiring, src, dst, rate_bit) for src, dst in group] for group in together]
    rates = [rate for group in inside(room, streams=streams) for rate in group]
    if not all(rates):
        src, dst = pairs[rates.index(0.0)]
        raise RoomError(f"no data comes through from rank {src} to rank {dst}")
    return 8 * median(rates) / rate_bit


def _equip(room: Room, wiring: Wiring, node: Node) -> None:
    room.batch("ip", wiring.interfaces(node), wiring.namespace(node))
    room.batch("tc", wiring.shapers(node), wiring.namespace(node))
    if isinstance(node, str):
        room.batch("bridge", wiring.stations(node), wiring.namespace(node))


def _delay(room: Room, wiring: Wiring, u: Node, v: Node) -> None:
    there = wiring.ports[u, v]
    if there.latency_us:
        impose(room, wiring, there, wiring.ports[v, u], Condition())


def _kernel_settings(wiring: Wiring, node: Node, more: dict[str, str]) -> dict[str, str]:
    if node in wiring.bridges:
        return {}
    waiting = {"net/ipv4/tcp_limit_output_bytes": str(round(_SOCKET_PACKETS * wiring.settings.mtu))}
    return _HOST | waiting | more | (_FORWARDING if node in wiring.forwards else {})


def _stream(wiring: Wiring, src: int, dst: int, rate_bit: int) -> tuple[str, str, str, float, float]:
    packets_s = _WINDOW_PACKETS * 8 * wiring.settings.mtu / rate_bit
    window = min(max(_WINDOW_S, packets_s), 4 * _WINDOW_S)
    settle = _SETTLE_S + 4 * wiring.burst_bytes(rate_bit) * 8 / rate_bit
    return wiring.namespace(src), wiring.namespace(dst), wiring.address(dst), settle, window


def _samples(topology: Topology) -> dict[float, list[tuple[int, int]]]:
    """For each rate, pairs of ranks with a link of that rate, and none slower, on the way: no rank twice."""
    found: dict[float, list[tuple[int, int]]] = {link.GBps: [] for link in topology.links}
    busy: dict[float, set[int]] = {GBps: set() for GBps in found}
    for src, dst in _pairs(topology):
        slowest = min(topology.GBps(u, v) for u, v in topology.path(src, dst))
        if len(found[slowest]) < _SAMPLES and not busy[slowest] & {src, dst}:
            found[slowest].append((src, dst))
            busy[slowest] |= {src, dst}
            if all(len(pairs) == _SAMPLES for pairs in found.values()):
                break
    return {GBps: pairs for GBps, pairs in found.items() if pairs}


def _pairs(topology: Topology) -> Iterator[tuple[int, int]]:
    """Ranks with a link between them, then all others."""
    for direct in (True, False):
        for src in range(topology.ranks):
            for dst in range(topology.ranks):
                if src != dst and (topology.link(src, dst) is not None) == direct:
                    yield src, dst
