"""Faults of a running cluster's links: slower, lossy, delayed, down, and as new again."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tasp_coll import ArgumentError
from tasp_coll.files import read_json, writing
from tasp_coll.links import Node
from vcluster_registry import Cluster
from vcluster_room import MissingError, Room, RoomError
from vcluster_wiring import Port, Wiring

_DIRECTORY = "faults"
MOST_DELAY_MS, MOST_SLOWER = 1e6, 1e9


@dataclass(frozen=True)
class Condition:
    """What is wrong with one direction of a link. slower: factor; lossy: share of packets; delayed_ms: on top."""

    down: bool = False
    slower: float = 1.0
    lossy: float = 0.0
    delayed_ms: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (("slower", 1, MOST_SLOWER), ("lossy", 0, 1), ("delayed_ms", 0, MOST_DELAY_MS)):
            if not low <= (value := getattr(self, name)) <= high:
                raise ArgumentError(f"{name} must be in {low:g}..{high:g}, got {value!r}")

    def __str__(self) -> str:
        told = [
            "down" if self.down else "",
            f"{self.slower:g} times slower" if self.slower != 1 else "",
            f"{100 * self.lossy:g} % lost" if self.lossy else "",
            f"{self.delayed_ms:g} ms later" if self.delayed_ms else "",
        ]
        return ", ".join(part for part in told if part) or "as new"

    def after(self, fault: str, amount: float | None) -> Condition:
        """The condition with one more fault; "up" clears all. ArgumentError for an amount that makes no sense."""
        if fault == "up":
            return Condition()
        if fault == "down":
            return replace(self, down=True)
        amount = amount or 0.0
        if fault == "slower":
            if not 1 <= amount <= MOST_SLOWER:
                raise ArgumentError(f"slower takes a factor in 1..{MOST_SLOWER:g}, got {amount:g}")
            return replace(self, slower=amount)
        if fault == "lossy":
            if amount > 100:
                raise ArgumentError(f"lossy takes a percentage in 0..100, got {amount:g}")
            return replace(self, lossy=amount / 100)
        if amount > MOST_DELAY_MS:
            raise ArgumentError(f"delayed takes milliseconds in 0..{MOST_DELAY_MS:g}, got {amount:g}")
        return replace(self, delayed_ms=amount)


def node(text: str, wiring: Wiring) -> Node:
    """The node that a user means: a rank's number or a switch's name."""
    if text in wiring.topology.switches:
        return text
    if text.isdecimal() and int(text) < wiring.topology.ranks:
        return int(text)
    switches = "".join(f", {name}" for name in wiring.topology.switches)
    raise ArgumentError(f"a link's end must be one of 0..{wiring.topology.ranks - 1}{switches}, got {text!r}")


def inflict(cluster: Cluster, a: str, b: str, fault: str, amount: float | None, *, one_way: bool) -> Condition:
    """Change the link between two nodes; the condition of the direction from `a` to `b`."""
    wiring = cluster.wiring()
    ends = node(a, wiring), node(b, wiring)
    if ends not in wiring.ports:
        raise ArgumentError(f"{wiring.topology.name} has no link between {a} and {b}")
    room = cluster.enter()
    for u, v in (ends,) if one_way else (ends, ends[::-1]):
        there, back = wiring.ports[u, v], wiring.ports[v, u]
        condition = _read(cluster, there).after(fault, amount)
        _impose(room, wiring, there, back, condition)
        _note(cluster, there, condition)
    return _read(cluster, wiring.ports[ends])


def conditions(cluster: Cluster) -> dict[tuple[Node, Node], Condition]:
    """The links that have faults, each direction by itself."""
    if not (cluster.directory / _DIRECTORY).exists():
        return {}
    found = {ends: _read(cluster, port) for ends, port in cluster.wiring().ports.items()}
    return {ends: condition for ends, condition in found.items() if condition != Condition()}


def _impose(room: Room, wiring: Wiring, there: Port, back: Port, condition: Condition) -> None:
    room.batch("tc", list(wiring.shaper(there, condition.slower, verb="change")), there.namespace)
    child = f"qdisc replace dev {there.device} parent 1:1"
    if condition.down:
        room.batch("tc", [f"{child} handle 30: blackhole"], there.namespace)
    elif condition.delayed_ms or there.latency_us:
        try:
            room.batch("tc", [wiring.delay(there, condition.delayed_ms)], there.namespace)
        except RoomError as error:
            raise MissingError(f"this kernel has no delays (CONFIG_NET_SCH_NETEM, sch_netem): {error}") from error
    else:
        room.batch("tc", [f"{child} handle 10: bfifo limit {wiring.queue_bytes(there)}"], there.namespace)
    _lose(room, back, condition.lossy)


def _lose(room: Room, port: Port, share: float) -> None:
    """Drop a share of what arrives at a port: there its sender learns of it as of any loss, by no acknowledgement."""
    with suppress(RoomError):  # there was none
        room.batch("tc", [f"qdisc del dev {port.device} clsact"], port.namespace)
    if not share:
        return
    # Classic BPF: load a random number of 32 bits; below the limit return 2 (TC_ACT_SHOT), else -1 (as configured).
    limit = min(round(share * 2**32), 2**32 - 1)
    code = f"4,32 0 0 4294963256,53 0 1 {limit},6 0 0 4294967295,6 0 0 2"
    lines = [
        f"qdisc add dev {port.device} clsact",
        f"filter add dev {port.device} ingress pref 1 handle 1 bpf da bytecode '{code}'",
    ]
    try:
        room.batch("tc", lines, port.namespace)
    except RoomError as error:
        part = "filters (CONFIG_NET_CLS_BPF, cls_bpf; CONFIG_NET_SCH_INGRESS, sch_ingress), which lose packets"
        raise MissingError(f"this kernel has no {part}: {error}") from error


def _file(cluster: Cluster, port: Port) -> Path:
    return cluster.directory / _DIRECTORY / f"{port.namespace}-{port.device}.json"


def _read(cluster: Cluster, port: Port) -> Condition:
    try:
        return read_condition(_file(cluster, port))
    except FileNotFoundError:
        return Condition()


def read_condition(path: Path) -> Condition:
    """What was noted in a file; ArgumentError for what cannot have been."""
    try:
        return Condition(**read_json(path))
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{path}: {error}: take the cluster down") from error


def _note(cluster: Cluster, port: Port, condition: Condition) -> None:
    path = _file(cluster, port)
    path.parent.mkdir(exist_ok=True)
    with writing(path) as partial:
        partial.write_text(json.dumps(asdict(condition)), encoding="utf-8")
