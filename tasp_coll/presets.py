"""Topologies that have a short name, each rate with its public source. Rates are GB/s each way.

Presets carry no latencies (0 us): vendors publish none. Where they matter, measure and write a topology file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import permutations
from math import prod
from typing import NamedTuple

from tasp_coll.errors import ArgumentTypeError, TopologyError
from tasp_coll.links import Link, MeshLinks
from tasp_coll.topology import Topology

# NVIDIA H100 Tensor Core GPU data sheet, SXM: NVLink 4 moves 900 GB/s, both ways together.
H100_NVLINK = 450.0
# NVIDIA DGX H100 user guide: eight ConnectX-7 ports of 400 Gbit/s for the compute fabric, one per GPU. NVIDIA DGX GB200
# data sheet: 72 of them for 72 GPUs.
NIC_400G = 50.0
# NVIDIA GB200 NVL72 data sheet: NVLink 5 moves 130 TB/s in all, 1.8 TB/s per GPU, both ways together.
NVL72_GPUS, NVL72_NVLINK = 72, 900.0
# AMD Instinct MI300X platform data sheet: eight GPUs, an Infinity Fabric link from each to every other,
# 896 GB/s per GPU over its seven links and both ways together.
MI300X_LINK = 64.0
# Graphs that stand for no product have links of one unit.
NOMINAL = 1.0
# Links of other presets than full_mesh:N are held one by one: hypercube:16 has so many.
MOST_LINKS = 1 << 20
# H100_NVLINK / NIC_400G, the ratio of cluster:UxM where R is left out.
CLUSTER_RATIO = Fraction(9)


def _full_mesh(name: str, n: int) -> Topology:
    return Topology(name, n, (), MeshLinks(n, NOMINAL))


def _nvswitch(name: str, n: int) -> Topology:
    _check_links(name, 2 * n)
    return Topology(name, n, ("nvswitch0",), tuple(_star("nvswitch0", range(n), H100_NVLINK)))


def _mi300x(name: str) -> Topology:
    return Topology(name, 8, (), MeshLinks(8, MI300X_LINK))


def _dgx_h100(name: str, nodes: int) -> Topology:
    _check_links(name, 4 * 8 * nodes)
    links: list[Link] = []
    for u in range(nodes):
        links += _star(f"nvswitch{u}", range(8 * u, 8 * u + 8), H100_NVLINK)
    return _joined(name, nodes, 8, tuple(f"nvswitch{u}" for u in range(nodes)), links)


def _cluster(name: str, nodes: int, m: int, ratio: Fraction | int = CLUSTER_RATIO) -> Topology:
    _check_links(name, nodes * m * (m + 1))
    rate = float(ratio * Fraction(NIC_400G))
    links = [Link(m * u + a, m * u + b, rate) for u in range(nodes) for a, b in permutations(range(m), 2)]
    return _joined(name, nodes, m, (), links)


def _nvl72(name: str, nodes: int) -> Topology:
    """Rank p of every node on the switch of its rail: a GPU's NIC reaches those of the same place in other nodes."""
    _check_links(name, 4 * NVL72_GPUS * nodes)
    links: list[Link] = []
    for u in range(nodes):
        links += _star(f"nvswitch{u}", range(NVL72_GPUS * u, NVL72_GPUS * (u + 1)), NVL72_NVLINK)
    switches = [f"nvswitch{u}" for u in range(nodes)]
    for p in range(NVL72_GPUS if nodes > 1 else 0):
        links += _star(f"rail{p}", range(p, NVL72_GPUS * nodes, NVL72_GPUS), NIC_400G)
        switches.append(f"rail{p}")
    return Topology(name, NVL72_GPUS * nodes, tuple(switches), tuple(links))


def _torus(name: str, *sides: int) -> Topology:
    """Ranks row by row, the last coordinate first. A dimension of 2 has one link, not two ways round; one of 1 none."""
    _check_links(name, sum(min(side - 1, 2) for side in sides) * prod(sides))
    ranks, stride = prod(sides), 1
    links: list[Link] = []
    for side in reversed(sides):
        for rank in range(ranks):
            at = rank // stride % side
            near = {(at - 1) % side, (at + 1) % side} - {at}
            links += [Link(rank, rank + (to - at) * stride, NOMINAL) for to in near]
        stride *= side
    return Topology(name, ranks, (), tuple(links))


def _hypercube(name: str, dimensions: int) -> Topology:
    n = 1 << dimensions
    links = tuple(Link(rank, rank ^ (1 << bit), NOMINAL) for rank in range(n) for bit in range(dimensions))
    return Topology(name, n, (), links)


def _check_links(name: str, links: int) -> None:
    if links > MOST_LINKS:
        raise TopologyError(f"spec must be of {MOST_LINKS} links at most (full_mesh:N of any number), got {name!r}")


def _star(switch: str, ranks: range, rate: float) -> Iterator[Link]:
    for rank in ranks:
        yield Link(rank, switch, rate)
        yield Link(switch, rank, rate)


def _joined(name: str, nodes: int, m: int, switches: tuple[str, ...], links: list[Link]) -> Topology:
    """Nodes joined by one NIC per rank on the switch "fabric", of which a single node has no need."""
    if nodes > 1:
        switches = (*switches, "fabric")
        links = [*links, *_star("fabric", range(nodes * m), NIC_400G)]
    return Topology(name, nodes * m, switches, links)


class _Form(NamedTuple):
    form: str
    meaning: str
    pattern: str
    build: Callable[..., Topology]


_N = r"0*([1-9][0-9]{0,5})"  # more than 999999 of anything is a slip of the keyboard
_R = r"((?=[0.]*[1-9])[0-9]{1,6}(?:\.[0-9]{1,6})?)"
_FORMS = (
    _Form("full_mesh:N", "N ranks, a 1 GB/s link from each to every other", f"full_mesh:{_N}", _full_mesh),
    _Form("nvswitch:N", "N H100 behind one NVSwitch, 450 GB/s each", f"nvswitch:{_N}", _nvswitch),
    _Form("mi300x", "8 MI300X, a 64 GB/s link from each to every other", "mi300x", _mi300x),
    _Form("dgx_h100:U", "U nodes of nvswitch:8, a 50 GB/s NIC per rank", f"dgx_h100:{_N}", _dgx_h100),
    _Form(
        "cluster:UxM[:R]",
        "U nodes of M ranks, a full mesh inside with links of R (or 9) NICs, a 50 GB/s NIC per rank",
        f"cluster:{_N}x{_N}(?::{_R})?",
        _cluster,
    ),
    _Form(
        "nvl72:U", "U nodes of 72 GB200 behind one NVSwitch, a 50 GB/s NIC per rank on its rail", f"nvl72:{_N}", _nvl72
    ),
    _Form(
        "torus:AxB[xC]",
        "A times B (times C) ranks, wrapped round every way, 1 GB/s links",
        f"torus:{_N}x{_N}(?:x{_N})?",
        _torus,
    ),
    _Form("hypercube:D", "2^D ranks, D <= 16, 1 GB/s links", "hypercube:0*([0-9]|1[0-6])", _hypercube),
)
_WIDTH = max(len(entry.form) for entry in _FORMS)
KNOWN_SPECS = "\n".join(f"  {entry.form:{_WIDTH}}  {entry.meaning}" for entry in _FORMS)
"""The forms of a preset's spec and what they mean, one a line: for error messages and `--help`."""


def is_preset(spec: str) -> bool:
    """True if `spec` means to be a preset's spec (perhaps with bad numbers) rather than a path."""
    return spec.partition(":")[0] in {entry.form.partition(":")[0] for entry in _FORMS}


def preset(spec: str) -> Topology:
    """The topology that `spec` names, such as "cluster:2x4"; else TopologyError with the known forms."""
    if not isinstance(spec, str):
        raise ArgumentTypeError(f"spec must be a string such as 'full_mesh:8', got {spec!r}")
    for entry in _FORMS:
        if match := re.fullmatch(entry.pattern, spec):
            numbers = [text for text in match.groups() if text is not None]
            return entry.build(spec, *(int(text) if text.isdigit() else Fraction(text) for text in numbers))
    raise TopologyError(f"spec must be a preset's (sizes from 1, ratio above 0), got {spec!r}:\n{KNOWN_SPECS}")
