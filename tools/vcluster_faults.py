"""Faults of a running cluster's links: slower, lossy, delayed, down, and as new again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from tasp_coll import ArgumentError
from tasp_coll.files import read_json, writing
from tasp_coll.links import Node
from vcluster_conditions import Condition, impose
from vcluster_registry import Cluster
from vcluster_wiring import Port, Wiring

_DIRECTORY = "faults"


def node(text: str, wiring: Wiring) -> Node:
    """The node that a user means: a rank's number or a switch's name."""
    if text in wiring.topology.switches:
        return text
    if text.isdecimal() and int(text) < wiring.topology.ranks:
        return int(text)
    switches = "".join(f", {name}" for name in wiring.topology.switches)
    raise ArgumentError(f"a link's end must be one of 0..{wiring.topology.ranks - 1}{switches}, got {text!r}")


def inflict(
    cluster: Cluster,
    a: str,
    b: str,
    fault: str,
    amount: float | None = None,
    jitter: float = 0.0,
    *,
    one_way: bool = False,
) -> Condition:
    """Change the link between two nodes; the condition of the direction from `a` to `b`."""
    wiring = cluster.wiring()
    ends = node(a, wiring), node(b, wiring)
    if ends not in wiring.ports:
        raise ArgumentError(f"{wiring.topology.name} has no link between {a} and {b}")
    room = cluster.enter()
    for u, v in (ends,) if one_way else (ends, ends[::-1]):
        there, back = wiring.ports[u, v], wiring.ports[v, u]
        condition = _read(cluster, there).after(fault, amount, jitter)
        impose(room, wiring, there, back, condition)
        _note(cluster, there, condition)
    return _read(cluster, wiring.ports[ends])


def conditions(cluster: Cluster) -> dict[tuple[Node, Node], Condition]:
    """The links that have faults, each direction by itself."""
    if not (cluster.directory / _DIRECTORY).exists():
        return {}
    found = {ends: _read(cluster, port) for ends, port in cluster.wiring().ports.items()}
    return {ends: condition for ends, condition in found.items() if condition != Condition()}


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
