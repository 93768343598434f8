"""GPUs and the links between them, from what the probes found: the matrix for people, the topology for --topology."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doctor_run import Findings
    from tasp_coll import Topology

SWITCH = "nvswitch0"
# nvmlNvlinkVersion_t of nvml.h: what nvmlDeviceGetNvLinkVersion answers is a place in this list, not a version.
_VERSIONS = ("", "1.0", "2.0", "2.2", "3.0", "3.1", "4.0", "5.0", "6.0")
# Some drivers answer 5.0 for Hopper, whose NVLinks are of the fourth generation.
_HOPPER = 9
# GB/s each way of one link, by generation, from NVIDIA's figures for a whole GPU, both ways together:
RATES = {
    "1": 20.0,  # Tesla P100 whitepaper: 160 GB/s over 4 links
    "2": 25.0,  # Tesla V100 whitepaper: 300 GB/s over 6 links
    "3": 25.0,  # A100 whitepaper: 600 GB/s over 12 links
    "4": 25.0,  # H100 data sheet, SXM: 900 GB/s over 18 links
    "5": 50.0,  # Blackwell architecture technical brief: 1.8 TB/s over 18 links
}


class NoTopologyError(Exception):
    """What was found makes no topology; the message says why."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, numbered as ranks are. `pci`: its address in one spelling, None if unknown."""

    index: int
    name: str
    memory_bytes: int | None
    pci: str | None

    def record(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class Connection:
    """From GPU `source` to a GPU, the switch, or what NVML does not name: access to its memory, and NVLinks.

    peer: None if unknown or not a GPU. version and GBps (of all NVLinks together, one way): None if unknown.
    """

    source: int
    target: int | str
    peer: bool | None
    nvlinks: int = 0
    version: str | None = None
    GBps: float | None = None

    def record(self) -> dict[str, Any]:
        """For programs."""
        told = asdict(self)
        return {"from": told.pop("source"), "to": told.pop("target"), **told}


def gpus(findings: Findings) -> tuple[Gpu, ...]:
    """In CuPy's order, which is that of ranks, else in the driver's."""
    for probe in ("cupy", "nvml", "smi"):
        if devices := findings[probe].facts.get("devices"):
            return tuple(
                Gpu(index, each["name"], each["memory_bytes"], _address(each["pci"]))
                for index, each in enumerate(devices)
            )
    return ()


def connections(findings: Findings) -> tuple[Connection, ...]:
    """Between all pairs of GPUs, and to what else NVLinks lead."""
    devices = gpus(findings)
    peers = findings["cupy"].facts.get("peers") or []
    linked = _linked(devices, findings["nvml"].facts.get("devices", []))
    found = []
    for a in devices:
        others: list[int | str] = [b.index for b in devices if b != a]
        others += sorted({str(target) for source, target in linked if source == a.index and isinstance(target, str)})
        for b in others:
            peer = bool(peers[a.index][b]) if peers and isinstance(b, int) else None
            count, version, rate = linked.get((a.index, b), (0, None, None))
            found.append(Connection(a.index, b, peer, count, version, rate))
    return tuple(found)


def matrix(devices: Sequence[Gpu], links: Sequence[Connection]) -> list[str]:
    """Lines of a table by source (rows) and target: NV6 is six NVLinks, "peer" access without any."""
    if len(devices) < 2:
        return []
    names: list[int | str] = [each.index for each in devices]
    names += sorted({link.target for link in links if isinstance(link.target, str)})
    known = {(link.source, link.target): link for link in links}
    cells = [["", *(f"GPU{name}" if isinstance(name, int) else name for name in names)]]
    cells += [[f"GPU{a.index}", *(_cell(known.get((a.index, b))) for b in names)] for a in devices]
    width = max(len(cell) for row in cells for cell in row)
    return [" ".join(cell.rjust(width) for cell in row) for row in cells]


def topology(devices: Sequence[Gpu], links: Sequence[Connection]) -> Topology:
    """GPUs as ranks, and their NVLinks; GPUs behind NVSwitch are joined by one switch. NoTopologyError says why not."""
    from tasp_coll import Link, Topology, TopologyError  # not above: this module must load where it is not installed

    used = [link for link in links if link.nvlinks and link.target != "elsewhere"]
    if not devices:
        raise NoTopologyError("there is no GPU")
    if len(devices) > 1 and not used:
        raise NoTopologyError("no NVLink is known between the GPUs")
    if unrated := sorted({str(link.version) for link in used if link.GBps is None}):
        raise NoTopologyError(f"the rate of NVLink {', '.join(unrated)} is not known here")
    made = [Link(link.source, link.target, link.GBps or 0.0) for link in used]
    made += [Link(link.target, link.source, link.GBps or 0.0) for link in used if isinstance(link.target, str)]
    switches = (SWITCH,) if any(link.target == SWITCH for link in used) else ()
    kinds = " and ".join(sorted({device.name for device in devices}))
    try:
        return Topology(f"{len(devices)} {kinds}, {'NVSwitch' if switches else 'NVLink'}", len(devices), switches, made)
    except TopologyError as error:
        raise NoTopologyError(f"NVLinks alone do not join the GPUs: {error}") from error


def _linked(
    devices: Sequence[Gpu], nvml: Sequence[dict[str, Any]]
) -> dict[tuple[int, int | str], tuple[int, str | None, float | None]]:
    """Number, version and rate of the NVLinks from each GPU (of ranks) to each target."""
    ranks: dict[str | None, int] = {device.pci: device.index for device in devices if device.pci is not None}
    counts: dict[tuple[int, int | str], int] = defaultdict(int)
    version: dict[tuple[int, int | str], str | None] = {}
    rates: dict[tuple[int, int | str], list[float | None]] = defaultdict(list)
    for device in nvml:
        source = ranks.get(_address(device["pci"]))
        if source is None:  # a GPU that CUDA_VISIBLE_DEVICES hides
            continue
        for link in device["links"]:
            target: int | str = SWITCH if link["remote"] == "switch" else "elsewhere"
            if link["remote"] == "gpu":
                target = ranks.get(_address(link["pci"]), "elsewhere")
            pair = source, target
            counts[pair] += link["count"]
            version[pair] = _version(link["version"], device["capability"])
            each = RATES.get((version[pair] or "").split(".")[0])
            rates[pair].append(None if each is None else each * link["count"])
    return {
        pair: (count, version[pair], None if None in rates[pair] else sum(rate or 0.0 for rate in rates[pair]))
        for pair, count in counts.items()
    }


def _version(number: int | None, capability: Sequence[int]) -> str | None:
    """NVLink's version by NVML's number for it."""
    if number is None or not 0 < number < len(_VERSIONS):
        return None
    told = _VERSIONS[number]
    return "4.0" if told == "5.0" and capability[0] == _HOPPER else told


def _address(pci: str | None) -> str | None:
    """One spelling of a PCI address: CUDA has four digits of the domain, NVML eight; letters are of either case."""
    try:
        domain, bus, device = (pci or "").split(":")
        return f"{int(domain, 16):04x}:{int(bus, 16):02x}:{int(device.split('.')[0], 16):02x}.0"
    except ValueError:
        return None


def _cell(link: Connection | None) -> str:
    if link is None:
        return "-"
    if link.nvlinks:
        return f"NV{link.nvlinks}"
    return {True: "peer", False: "no", None: "?" if isinstance(link.target, int) else "-"}[link.peer]
