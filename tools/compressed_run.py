"""The run of `compressed_perf.py` on every rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dynasty
import tasp_coll
from compressed_perf import TOOL, Options
from perf_report import write_json

if TYPE_CHECKING:
    from mpi4py import MPI

_BLOCK, _LAYERS = 256, 16


@dataclass
class Trial:
    """A format, and what its calls took on the slowest rank."""

    name: str
    feedback: dynasty.Feedback
    seconds: list[float] = field(default_factory=list)
    packing: list[float] = field(default_factory=list)
    bytes: int = 0
    float32_bytes: int = 0
    error: float = 0.0

    @property
    def bits(self) -> int | str:
        """As `dynasty.all_reduce` takes it."""
        return int(self.name) if self.name.isdigit() else self.name


@dataclass(frozen=True)
class Row:
    """What is told of a format. `less`: times fewer bytes than float32; `ratio`: times as fast as the first format."""

    format: str
    bytes: int
    less: float
    mean_bits: float
    median_s: float
    min_s: float
    max_s: float
    packing: float
    ratio: float
    error: float

    def record(self) -> dict[str, Any]:
        """For the file."""
        return asdict(self)


def run(world: MPI.Intracomm, options: Options) -> int:
    """The test; its exit status, the same on all ranks."""
    torch.set_num_threads(1)
    trials = [Trial(name, dynasty.Feedback()) for name in options.formats]
    with tasp_coll.Communicator(world, timeout=options.timeout) as comm:
        grads = gradients(comm.rank, options.elements)
        alike = [_check(comm, trial, grads, options) for trial in trials]
        for i in range(options.warmup + options.iters):
            for j in range(len(trials)):
                trial = trials[(i + j) % len(trials)]
                sent = _call(comm, trial, grads.clone(), options, trial.feedback)
                slowest = max(world.allgather((sent.seconds, sent.pack_seconds)))
                if i >= options.warmup:
                    trial.seconds.append(slowest[0])
                    trial.packing.append(slowest[1] / slowest[0])
        if comm.rank == 0:
            _tell(comm, options, [_row(trial, median(trials[0].seconds)) for trial in trials])
    return int(not all(alike))


def gradients(rank: int, elements: int) -> Tensor:
    """(elements,) float32: 16 layers of different scale, blocks that differ within them, a mean and a rank's noise."""
    blocks = -(-elements // _BLOCK)
    shared = torch.Generator().manual_seed(0)
    layers = torch.randn(_LAYERS, generator=shared).mul(2).exp().repeat_interleave(-(-blocks // _LAYERS))[:blocks]
    scale = layers * torch.randn(blocks, generator=shared).exp()
    mean = torch.randn(blocks, _BLOCK, generator=shared)
    noise = torch.randn(blocks, _BLOCK, generator=torch.Generator().manual_seed(1 + rank))
    return ((mean + noise) * scale.unsqueeze(1)).flatten()[:elements].clone()


def _call(comm: Any, trial: Trial, grads: Tensor, options: Options, feedback: dynasty.Feedback | None) -> dynasty.Sent:
    kept = None if trial.name == "float32" else feedback
    return dynasty.all_reduce(grads, comm, bits=trial.bits, mean_bits=options.mean_bits, feedback=kept)


def _check(comm: Any, trial: Trial, grads: Tensor, options: Options) -> bool:
    """Error and bytes of one call; whether all ranks got the same bits."""
    found = grads.clone()
    sent = _call(comm, trial, found, options, None)
    true = comm.decomposed_allreduce(grads.double(), op="avg")
    trial.error = float((found - true).norm() / true.norm())
    trial.bytes, trial.float32_bytes = sent.bytes, sent.float32_bytes
    bits = found.view(torch.int32)
    same: Tensor = comm.decomposed_allreduce(bits, op="max") == comm.decomposed_allreduce(bits, op="min")
    return bool(same.all())


def _row(trial: Trial, base: float) -> Row:
    sent = max(trial.bytes, 1)
    times = median(trial.seconds), min(trial.seconds), max(trial.seconds)
    mean_bits = 32 * trial.bytes / max(trial.float32_bytes, 1)
    rates = median(trial.packing), base / times[0], trial.error
    return Row(trial.name, trial.bytes, trial.float32_bytes / sent, mean_bits, *times, *rates)


def _tell(comm: Any, options: Options, rows: list[Row]) -> None:
    print(
        f"# {TOOL}, tasp-coll {tasp_coll.__version__}, torch {torch.__version__}\n"
        f"# {comm.size} ranks, topology {comm.topology.name}; mean of {options.elements} elements, "
        f"dynamic within {options.mean_bits:g} bits each\n"
        f"# warmup iters: {options.warmup} iters: {options.iters}\n"
        f"{'format':>9} {'bytes':>10} {'less':>6} {'median_ms':>10} {'min_ms':>8} {'max_ms':>8} {'packing':>8} "
        f"{'ratio':>6} {'error':>9}"
    )
    for row in rows:
        times = f"{row.median_s * 1e3:10.1f} {row.min_s * 1e3:8.1f} {row.max_s * 1e3:8.1f}"
        shares = f"{row.packing:8.1%} {row.ratio:6.2f} {row.error:9.2e}"
        print(f"{row.format:>9} {row.bytes:10} {row.less:6.2f} {times} {shares}", flush=True)
    if options.json is not None:
        head = {"tool": TOOL, "version": tasp_coll.__version__, "world_size": comm.size, "elements": options.elements}
        write_json(options.json, {**head, "mean_bits": options.mean_bits, "topology": comm.topology.name}, rows)
