"""The cases of model_check.py: clusters at rates that two cores carry, and what runs on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasp_coll import Topology

_ALL = "rings,ring,direct,native,auto"


@dataclass(frozen=True)
class CheckCase:
    """A tool of this folder with its flags, on a cluster of links of `mbit` at most. dead: a link that is left out."""

    name: str
    topology: str
    mbit: float
    tool: str
    flags: tuple[str, ...]
    mtu: int | None = None
    dead: tuple[int, int] | None = None

    def cluster(self, folder: Path) -> list[str]:
        """Flags of virtual_cluster.py; writes a topology file into `folder` where that is needed."""
        spec = self.topology
        if self.dead:
            spec = str(folder / "topology.json")
            Topology.preset(self.topology).without_link(*self.dead).save(spec)
        return ["--topology", spec, "--link-mbit", f"{self.mbit:g}", *(["--mtu", str(self.mtu)] if self.mtu else [])]

    @property
    def command(self) -> str:
        """For people."""
        gone = f" without {self.dead[0]}-{self.dead[1]}" if self.dead else ""
        return f"{self.topology}{gone}, {self.mbit:g} Mbit/s: {self.tool} {' '.join(self.flags)}"


def _gather(
    topology: str, ranks: int, mbit: float, kib: int, algorithms: str, dead: tuple[int, int] | None = None
) -> CheckCase:
    size = f"{ranks * kib}K"
    flags = ("-b", size, "-e", size, "-n", "5", "-w", "1", "--out-of-place", "--algo", algorithms)
    name = topology + (" without a link" if dead else "")
    return CheckCase(f"{name} {mbit:g}", topology, mbit, "all_gather_perf.py", flags, dead=dead)


def _reduce(tool: str, topology: str, ranks: int, mbit: float, kib: int, algorithms: str) -> CheckCase:
    size = f"{ranks * kib}K"
    flags = ("-b", size, "-e", size, "-n", "5", "-w", "1", "--out-of-place", "--algo", algorithms)
    return CheckCase(f"{topology} {mbit:g} {tool.removesuffix('_perf.py')}", topology, mbit, tool, flags)


def _attention(mbit: float, mtu: int, heads: int, methods: str, *more: str) -> CheckCase:
    flags = ("-s", "4K", "--heads", str(heads), "--kv-heads", "1", "-m", methods, "-n", "3", "-w", "1", *more)
    kind = " ".join(["attention", *(flag.strip("-") for flag in more if flag.startswith("--"))])
    return CheckCase(f"{kind} {mbit:g}", "full_mesh:8", mbit, "attention_perf.py", flags, mtu)


def _cases() -> Iterator[CheckCase]:
    yield _gather("full_mesh:8", 8, 10, 512, _ALL)
    yield _gather("full_mesh:8", 8, 100, 4096, _ALL)
    for ranks in (4, 5, 6, 7, 9):
        yield _gather(f"full_mesh:{ranks}", ranks, 50, 1024, _ALL)
    yield _gather("full_mesh:8", 8, 50, 1024, "rings,ring,native,auto", dead=(0, 1))
    yield _gather("torus:4x4", 16, 20, 512, _ALL)
    yield _gather("nvswitch:8", 8, 70, 1024, "rings,ring,native,auto")
    yield _gather("cluster:2x4", 8, 180, 1024, "rings,hierarchical,native,auto")
    yield _gather("cluster:3x3", 9, 180, 1024, "rings,hierarchical,native,auto")
    yield _gather("cluster:4x2", 8, 180, 1024, "rings,hierarchical,native,auto")
    yield _gather("dgx_h100:2", 16, 90, 512, "rings,hierarchical,native,auto")
    yield _reduce("reduce_scatter_perf.py", "full_mesh:8", 8, 50, 1024, "rings,ring,auto")
    yield _reduce("all_reduce_perf.py", "full_mesh:5", 5, 50, 1024, "rings,ring,auto")
    yield _attention(2.4, 4000, 16, "tasp,ring,allgather,ulysses,compute")
    yield _attention(1.3, 4000, 128, "tasp,ring,allgather,compute")
    yield _attention(2.2, 4000, 128, "tasp,ring,allgather,compute")
    yield _attention(3.2, 4000, 128, "tasp,ring,allgather,compute")
    yield _attention(6.4, 8000, 128, "tasp,ring,allgather,compute")
    yield _attention(1.3, 4000, 128, "tasp,ring,allgather,compute", "--causal")
    yield _attention(5, 8000, 128, "tasp,ring,allgather,compute", "--causal")
    yield _attention(4, 4000, 64, "tasp,ring,allgather,compute", "--backward")


CASES = tuple(_cases())
