"""The run of `train_step_perf.py` on every rank."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tasp_coll.torch_backend  # registers "tasp"
from perf_algorithms import join_gloo
from perf_report import write_json
from tasp_coll.topology import ENVIRONMENT
from train_step_perf import TOOL, Options

if TYPE_CHECKING:
    from mpi4py import MPI

_VOCABULARY, _TOLERANCE = 256, 1e-3


class Model(nn.Module):
    """Embedding, transformer layers, and the next token."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        width = options.width
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0, batch_first=True) for _ in range(options.depth)
        )
        self.head = nn.Linear(width, _VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, L, vocabulary)."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        found: Tensor = self.head(hidden)
        return found


@dataclass
class Training:
    """One model over one back end, and its steps' seconds."""

    kind: str
    backend: str
    step: Callable[[Tensor], float]
    parameters: int
    seconds: list[float] = field(default_factory=list)
    loss: float = math.nan


@dataclass(frozen=True)
class Row:
    """What is told of a training. `ratio`: how many times as fast as the first of its kind."""

    kind: str
    backend: str
    median_s: float
    min_s: float
    max_s: float
    ratio: float
    loss: float

    def record(self) -> dict[str, Any]:
        """For the file."""
        return asdict(self)


def run(world: MPI.Intracomm, options: Options) -> int:
    """The test; its exit status, the same on all ranks."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # about writing to the model's result, which we do not
    distributed = join_gloo(world, options.timeout)
    groups = {name: distributed.new_group(backend=name) for name in options.backends}
    rows = []
    for kind in options.kinds:
        trainings = [_training(kind, name, groups[name], options) for name in options.backends]
        _measure(world, trainings, options)
        base = median(trainings[0].seconds)
        rows += [_row(training, base) for training in trainings]
    if world.rank == 0:
        _tell(options, world.size, trainings[0].parameters, rows)
    distributed.destroy_process_group()
    first = {row.kind: row.loss for row in reversed(rows)}
    return int(any(abs(row.loss - first[row.kind]) > _TOLERANCE for row in rows))


def _training(kind: str, backend: str, group: Any, options: Options) -> Training:
    torch.manual_seed(1)
    model: nn.Module = Model(options)
    parameters = sum(x.numel() for x in model.parameters())
    if kind == "ddp":
        model = DistributedDataParallel(model, process_group=group)
    else:
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(tokens: Tensor) -> float:
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Training(kind, backend, step, parameters)


def _measure(world: MPI.Intracomm, trainings: list[Training], options: Options) -> None:
    """Step by step, the order turning; a step takes as long as on the slowest rank."""
    generator = torch.Generator().manual_seed(world.rank)
    for i in range(options.warmup + options.iters):
        tokens = torch.randint(_VOCABULARY, (options.batch, options.seq_len + 1), generator=generator)
        for j in range(len(trainings)):
            training = trainings[(i + j) % len(trainings)]
            world.Barrier()
            began = perf_counter()
            training.loss = training.step(tokens)
            seconds = max(world.allgather(perf_counter() - began))
            if i >= options.warmup:
                training.seconds.append(seconds)
    for training in trainings:
        training.loss = sum(world.allgather(training.loss)) / world.size


def _row(training: Training, base: float) -> Row:
    middle, seconds = median(training.seconds), training.seconds
    return Row(training.kind, training.backend, middle, min(seconds), max(seconds), base / middle, training.loss)


def _tell(options: Options, size: int, parameters: int, rows: list[Row]) -> None:
    topology = os.environ.get(ENVIRONMENT) or "none named"
    print(
        f"# {TOOL}, tasp-coll {tasp_coll.__version__}, torch {torch.__version__}\n"
        f"# {size} ranks, topology {os.path.basename(topology)}; {parameters} parameters in float32, "
        f"{options.batch} x {options.seq_len} tokens per rank\n"
        f"# warmup iters: {options.warmup} iters: {options.iters}\n"
        f"{'kind':>6} {'backend':>8} {'median_ms':>10} {'min_ms':>9} {'max_ms':>9} {'ratio':>6} {'loss':>9}"
    )
    for row in rows:
        times = f"{row.median_s * 1e3:10.1f} {row.min_s * 1e3:9.1f} {row.max_s * 1e3:9.1f}"
        print(f"{row.kind:>6} {row.backend:>8} {times} {row.ratio:6.2f} {row.loss:9.6f}", flush=True)
    if options.json is not None:
        head = {"tool": TOOL, "version": tasp_coll.__version__, "world_size": size, "parameters": parameters}
        write_json(options.json, {**head, "topology": topology}, rows)
