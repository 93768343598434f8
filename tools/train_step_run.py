"""What train_step_perf.py measures: models in turn over each backend, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tasp_coll
import tasp_coll.torch_backend
from perf_algorithms import join_gloo
from perf_measure import turns
from perf_report import write_json
from train_step_perf import TOOL, Options

if TYPE_CHECKING:
    from mpi4py import MPI

_VOCABULARY = 64
_CLOSE = 1e-4  # of weights after some steps: sums are added in another order


@dataclass
class Trainee:
    """One copy of the model over one backend."""

    backend: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, ids: Tensor) -> None:
        """Forward, backward, update."""
        loss = nn.functional.cross_entropy(self.model(ids).flatten(0, 1), ids.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def weights(self) -> Tensor:
        """All of them, one after another."""
        found = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in self.model.parameters())
        return torch.cat([weight.detach().flatten() for weight in found])


@dataclass(frozen=True)
class Result:
    """One program over one backend. seconds: of each step on the slowest rank; difference: to the first backend."""

    program: str
    backend: str
    seconds: list[float]
    ratio: float
    difference: float

    def times_us(self) -> dict[str, float]:
        """Over the steps."""
        times = [second * 1e6 for second in self.seconds]
        return {"min": min(times), "median": median(times), "max": max(times)}

    def record(self) -> dict[str, Any]:
        """For --json."""
        told = {"program": self.program, "backend": self.backend, "time_us": self.times_us()}
        return {**told, "ratio": self.ratio, "difference": self.difference}

    def row(self) -> str:
        """For people."""
        times = self.times_us()
        cells = "".join(f" {times[name] / 1e3:10.2f}" for name in ("median", "min", "max"))
        return f"  {self.program:8} {self.backend:8}{cells} {self.ratio:7.2f} {self.difference:10.1e}"


def run(world: MPI.Intracomm, options: Options) -> int:
    """Measure and report; 1 if the backends do not agree."""
    torch.set_num_threads(1)
    join_gloo(world, options.timeout)
    groups = {name: _group(name) for name in dict.fromkeys(options.backends)}
    say = print if world.rank == 0 else lambda *_: None
    say(f"# {TOOL} {tasp_coll.__version__}, {world.size} ranks, {options.shapes()}")
    say(f"# time of a step on the slowest rank: median of {options.iters}; ratio to {options.backends[0]}, pairwise")
    say(f"# {'program':8} {'backend':8} {'time(ms)':>10} {'min':>10} {'max':>10} {'ratio':>7} {'differs':>10}")
    results: list[Result] = []
    for program in options.programs:
        trainees = [_trainee(program, name, groups[name], options) for name in options.backends]
        for iteration in range(-options.warmup, options.iters):
            _iterate(world, trainees, iteration, options)
        results += [_result(world, program, trainee, trainees[0]) for trainee in trainees]
        for result in results[-len(trainees) :]:
            say(result.row())
    if options.json is not None and world.rank == 0:
        head = {"tool": TOOL, "version": tasp_coll.__version__, "world_size": world.size, **options.shapes()}
        write_json(options.json, head, results)
    dist.destroy_process_group()
    agree = all(result.difference <= _CLOSE for result in results)
    say("# backends agree" if agree else f"# FAILED: weights differ by more than {_CLOSE}")
    return 0 if agree else 1


def _group(backend: str) -> dist.ProcessGroup:
    group = dist.new_group(backend="cpu:tasp" if backend == "tasp" else backend)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _trainee(program: str, backend: str, group: dist.ProcessGroup, options: Options) -> Trainee:
    torch.manual_seed(0)
    width = options.width
    layers = [nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, batch_first=True) for _ in range(options.depth)]
    model = nn.Sequential(nn.Embedding(_VOCABULARY, width), *layers, nn.Linear(width, _VOCABULARY))
    spread = _SPREAD[program](model, group)
    return Trainee(backend, spread, torch.optim.SGD(spread.parameters(), 0.05))


def _replicated(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    return DistributedDataParallel(model, process_group=group)


def _sharded(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in list(model.children())[1:-1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


_SPREAD: dict[str, Callable[[nn.Module, dist.ProcessGroup], nn.Module]] = {"ddp": _replicated, "fsdp": _sharded}


def _iterate(world: MPI.Intracomm, trainees: list[Trainee], iteration: int, options: Options) -> None:
    """A step of each, in changing order."""
    generator = torch.Generator().manual_seed(1000 * (iteration + options.warmup) + world.rank)
    ids = torch.randint(0, _VOCABULARY, (options.batch, options.seq_len), generator=generator)
    for place in turns(len(trainees), iteration):
        world.Barrier()
        begun = perf_counter()
        trainees[place].step(ids)
        seconds = perf_counter() - begun
        if iteration >= 0:
            trainees[place].seconds.append(seconds)


def _result(world: MPI.Intracomm, program: str, trainee: Trainee, first: Trainee) -> Result:
    """What is reported of one trainee, the same on all ranks."""
    slowest = [max(column) for column in zip(*world.allgather(trainee.seconds), strict=True)]
    compared = [max(column) for column in zip(*world.allgather(first.seconds), strict=True)]
    ratio = median(mine / other for mine, other in zip(slowest, compared, strict=True))
    losses = max(abs(mine - other) for mine, other in zip(trainee.losses, first.losses, strict=True))
    weights = float((trainee.weights() - first.weights()).detach().abs().max())
    return Result(program, trainee.backend, slowest, ratio, max(world.allgather(max(losses, weights))))
