"""Topology files: JSON with every entry checked, and errors that name the entry."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tasp_coll.errors import TopologyError
from tasp_coll.files import read_json, writing
from tasp_coll.links import Link, LinkError, Node, order
from tasp_coll.topology import Topology


def read(path: Path) -> Topology:
    """The topology in a file; TopologyError names the file and the entry at fault."""
    try:
        return _from_json(read_json(path), os.fsencode(path.stem).decode(errors="replace"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: TopologyError, and bad JSON
        raise TopologyError(f"topology file {str(path)!r}: {error}") from error


def write(topology: Topology, path: Path) -> None:
    """Write a file that `read` reads back equal; other readers see all of it or nothing."""
    head = {"name": topology.name, "ranks": topology.ranks, "switches": topology.switches}
    with writing(path) as partial, open(partial, "w", encoding="utf-8") as out:
        out.write(json.dumps(head)[:-1] + ', "links": [')
        for i, entry in enumerate(_entries(topology)):
            out.write(f"{',' if i else ''}\n  {json.dumps(entry)}")
        out.write("\n]}\n")


def _entries(topology: Topology) -> Iterator[dict[str, Node | float | bool]]:
    """The `links` of a topology file: two equal directions make one duplex entry."""
    for link in topology.links:
        back = topology.link(link.target, link.source)
        duplex = back is not None and (back.GBps, back.latency_us) == (link.GBps, link.latency_us)
        if duplex and order(link.source) > order(link.target):
            continue
        ends = {"from": link.source, "to": link.target}
        yield {**ends, "GBps": link.GBps, "latency_us": link.latency_us, "duplex": duplex}


def _check_keys(where: str, value: object, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TopologyError(f"{where} must be an object, got {value!r}")
    if missing := required - value.keys():
        raise TopologyError(f"{where} must have the key {min(missing)!r}")
    if unknown := value.keys() - required - optional:
        known = ", ".join(sorted(required | optional))
        raise TopologyError(f"{where} has the unknown key {min(unknown)!r}; known are {known}")
    return value


def _from_json(value: object, stem: str) -> Topology:
    top = _check_keys("the topology", value, {"ranks", "links"}, {"name", "switches"})
    if not isinstance(top["links"], list):
        raise TopologyError(f"links must be a list, got {top['links']!r}")
    per_entry = [_links_of(i, entry) for i, entry in enumerate(top["links"])]
    try:
        links = tuple(chain.from_iterable(per_entry))
        return Topology(top.get("name", stem), top["ranks"], top.get("switches", ()), links)
    except LinkError as error:  # it counts links; a duplex entry stands for two
        entries = [i for i, both in enumerate(per_entry) for _ in both]
        key = {"source": "from", "target": "to"}.get(error.field, error.field)
        raise LinkError(entries[error.index], key, error.rule) from None


def _links_of(i: int, entry: object) -> tuple[Link, ...]:
    link = _check_keys(f"links[{i}]", entry, {"from", "to", "GBps"}, {"latency_us", "duplex"})
    duplex = link.get("duplex", False)
    if not isinstance(duplex, bool):
        raise LinkError(i, "duplex", f"must be true or false, got {duplex!r}")
    rates = link["GBps"], link.get("latency_us", 0.0)
    there = Link(link["from"], link["to"], *rates)
    return (there, Link(link["to"], link["from"], *rates)) if duplex else (there,)
