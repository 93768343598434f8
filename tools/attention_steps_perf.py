"""What attention's step loop costs beside its kernels: the loop with communication switched off, against one call of
the kernel over as many pairs of tokens. One process, one GPU (or none); the other ranks are imaginary.

    python tools/attention_steps_perf.py --local-tokens 8K,32K --json steps.json
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import attention
import tasp_coll
from attention.kernels import Kernel, kernel_for
from attention_options import count
from attention_silent import alone
from perf_options import integer
from perf_report import write_json

TOOL = "attention_steps_perf"
Seconds = tuple[float, float]  # forward, backward


@dataclass(frozen=True)
class Result:
    """One length and mask: seconds of the loop and of the kernel alone, forward and backward."""

    local_tokens: int
    ranks: int
    causal: bool
    dtype: str
    heads: int
    head_dim: int
    kernel: str
    loop: Seconds
    alone: Seconds

    @property
    def shares(self) -> Seconds:
        """Of the kernel's own speed."""
        return self.alone[0] / self.loop[0], self.alone[1] / self.loop[1]

    def record(self) -> dict[str, Any]:
        """For programs."""
        named = ("local_tokens", "ranks", "causal", "dtype", "heads", "head_dim", "kernel")
        times = zip(("forward", "backward"), self.loop, self.alone, self.shares, strict=True)
        parts = {name: {"loop_us": 1e6 * loop, "kernel_us": 1e6 * once, "share": s} for name, loop, once, s in times}
        return {**{name: getattr(self, name) for name in named}, **parts}

    def row(self) -> str:
        """For people."""
        cells = [f"{self.local_tokens:9} {'causal' if self.causal else 'full':6} {self.kernel:10}"]
        for loop, once, share in zip(self.loop, self.alone, self.shares, strict=True):
            cells.append(f"{loop * 1e3:10.3f} {once * 1e3:10.3f} {share:6.3f}")
        return "  ".join(cells)


class Clock:
    """Seconds of a call on a device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """And what it returned."""
        if not self._cuda:
            begun = perf_counter()
            found = call()
            return perf_counter() - begun, found
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        found = call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3, found


def measure(given: argparse.Namespace, local: int, causal: bool, device: torch.device) -> Result:
    """The loop and the kernel, iteration by iteration in turn."""
    dtype = getattr(torch, given.dtype)
    shape = given.batch, given.heads, local, given.head_dim
    query, key, value, grad = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    kernel, clock = kernel_for(query), Clock(device)
    loop: list[Seconds] = []
    once: list[Seconds] = []
    with alone(given.ranks, device.index if device.type == "cuda" else None) as comm:
        single = _Single(kernel, given, local, causal, device)
        for iteration in range(-given.warmup_iters, given.iters):
            pair = _loop(comm, clock, (query, key, value), grad, causal), single.times(clock)
            if iteration >= 0:
                loop.append(pair[0])
                once.append(pair[1])
    middle = [tuple(median(part) for part in zip(*times, strict=True)) for times in (loop, once)]
    shown = given.ranks, causal, given.dtype, given.heads, given.head_dim, kernel.name
    return Result(local, *shown, *middle)


def _loop(
    comm: tasp_coll.Communicator, clock: Clock, inputs: tuple[Tensor, ...], grad: Tensor, causal: bool
) -> Seconds:
    query, key, value = leaves = [x.detach().requires_grad_() for x in inputs]

    def attend() -> Tensor:
        return attention.context_parallel_attention(query, key, value, is_causal=causal, comm=comm, method="tasp")

    forward, out = clock(attend)
    backward, _ = clock(lambda: torch.autograd.grad(out, leaves, grad))
    return forward, backward


class _Single:
    """One call over as many pairs of tokens as the loop has: all keys, or a causal square of that size."""

    def __init__(
        self, kernel: Kernel, given: argparse.Namespace, local: int, causal: bool, device: torch.device
    ) -> None:
        rows = round(local * math.sqrt(given.ranks)) if causal else local
        keys = rows if causal else local * given.ranks
        self._kernel, self._causal, self._scale = kernel, causal, given.head_dim**-0.5
        # Pairs of the loop, which sees each rank's own tokens causally, over those of the call.
        total = local * given.ranks
        self._ratio = (total * (total + 1) / given.ranks) / (rows * (rows + 1)) if causal else 1.0
        dtype = getattr(torch, given.dtype)
        shapes = ((given.batch, given.heads, length, given.head_dim) for length in (rows, keys, keys, rows))
        self._query, self._key, self._value, self._grad = (torch.randn(s, dtype=dtype, device=device) for s in shapes)

    def times(self, clock: Clock) -> Seconds:
        query, key, value, how = self._query, self._key, self._value, {"causal": self._causal, "scale": self._scale}
        forward, (out, lse) = clock(lambda: self._kernel.forward(query, key, value, **how))
        backward, _ = clock(lambda: self._kernel.backward(self._grad, query, key, value, out, lse, **how))
        return forward * self._ratio, backward * self._ratio


def main(argv: Sequence[str] | None = None) -> None:
    """Run it, and leave with status 2 for what is not possible here."""
    given = parser().parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(f"{TOOL}: --device cuda: this torch sees no GPU", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", torch.cuda.current_device()) if given.device == "cuda" else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"# {TOOL}, tasp-coll {tasp_coll.__version__}, torch {torch.__version__}, {name}")
    print(f"# {given.ranks} ranks, {given.heads} heads of {given.head_dim}, {given.dtype}; share = kernel / loop")
    print("#  tokens mask   kernel      forward: loop and kernel (ms)      backward: loop and kernel (ms)")
    results = []
    for local in given.local_tokens:
        for causal in (False, True):
            results.append(measure(given, local, causal, device))
            print(results[-1].row(), flush=True)
            if given.json is not None:  # after each, so that nothing is lost if the time runs out
                write_json(given.json, {"tool": TOOL, "version": tasp_coll.__version__, "device": name}, results)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{TOOL}.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lengths = [8192, 32768]
    parser.add_argument(
        "--local-tokens", type=_counts, default=lengths, metavar="N,M", help="of a rank (default 8K,32K)"
    )
    parser.add_argument("--ranks", type=integer(2), default=4, metavar="N", help="steps of the loop (default 4)")
    parser.add_argument("--batch", type=integer(1), default=1, metavar="N", help="sequences (default 1)")
    parser.add_argument("--heads", type=integer(1), default=8, metavar="N", help="heads (default 8)")
    parser.add_argument(
        "--head-dim", type=integer(1), default=128, metavar="N", help="elements of a head (default 128)"
    )
    parser.add_argument("-d", "--dtype", choices=("bfloat16", "float16", "float32", "float64"), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where (default cuda)")
    parser.add_argument("-n", "--iters", type=integer(1), default=10, metavar="N", help="timed (default 10)")
    parser.add_argument("-w", "--warmup_iters", type=integer(0), default=3, metavar="N", help="untimed (default 3)")
    parser.add_argument("-J", "--json", type=Path, metavar="PATH", help="write the results, unrounded")
    return parser


def _counts(text: str) -> list[int]:
    """Even ones: with a causal mask a rank's tokens are as many from both ends of the sequence."""
    found = [count(part) for part in text.split(",")]
    if odd := [each for each in found if each % 2]:
        raise argparse.ArgumentTypeError(f"must be even numbers, got {odd[0]}")
    return found


if __name__ == "__main__":
    main()
