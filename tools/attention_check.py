"""Results beside dense attention in float64, of the inputs of all ranks brought together on rank 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attention.dense import dense_attention
from attention.kv_bits import Bits
from attention_measure import Bench
from attention_methods import Method
from attention_options import COMPUTE
from attention_report import Errors

if TYPE_CHECKING:
    from mpi4py import MPI

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}


def tolerance(dtype: str, kv_bits: int | str | None) -> float:
    """What `Errors.largest` may be. In b bits a number is off by 2^-b of its group's peak at most."""
    bits = Bits.of(kv_bits)
    return TOLERANCES[dtype] + (0.0 if bits is None else 2.0 ** (2 - bits.mean))


def errors(bench: Bench, methods: list[Method]) -> list[Errors | None]:
    """Of each method; None for computing on no data."""
    wanted: dict[tuple[int, ...], list[Tensor]] = {}
    return [None if method.name == COMPUTE else _error(bench, method, wanted) for method in methods]


def _error(bench: Bench, method: Method, wanted: dict[tuple[int, ...], list[Tensor]]) -> Errors:
    """wanted: the reference by the order of tokens, on rank 0."""
    world, outcome = bench.world, bench.once(method)
    positions = world.gather(method.positions().tolist())
    inputs = [_whole(world, x, positions) for x in bench.inputs(method)]
    found = [_whole(world, x, positions) for x in (outcome.out, *outcome.gradients)]
    error = Errors(0.0, 0.0)
    if positions is not None:
        order = tuple(position for held in positions for position in held)
        if order not in wanted:
            wanted[order] = _dense(bench, [x for x in inputs if x is not None])
        pairs = list(zip((x for x in found if x is not None), wanted[order], strict=True))
        out, dense = pairs[0]
        largest = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        error = Errors(largest, float((out - dense).norm() / dense.norm()))
    return world.bcast(error)


def _whole(world: MPI.Intracomm, x: Tensor, positions: list[list[int]] | None) -> Tensor | None:
    """(B, H, L, D) of each rank -> (B, H, total, D) in the sequence's order and float64, on rank 0."""
    parts = world.gather(x.double().cpu().numpy())
    if parts is None or positions is None:
        return None
    order = torch.tensor([position for held in positions for position in held])
    gathered = torch.cat([torch.from_numpy(part) for part in parts], 2)
    return torch.empty_like(gathered).index_copy_(2, order, gathered)


def _dense(bench: Bench, inputs: list[Tensor]) -> list[Tensor]:
    """Result and gradients, a head of keys at a time, as all scores together may not fit."""
    options = bench.options
    query, key, value, grad = inputs
    out, gradients = torch.empty_like(query), [torch.empty_like(x) for x in (query, key, value)]
    group = options.heads // options.kv_heads
    for sequence in range(options.batch):
        for head in range(options.kv_heads):
            rows = slice(head * group, (head + 1) * group)
            wheres = [(slice(sequence, sequence + 1), which) for which in (rows, slice(head, head + 1))]
            wheres.append(wheres[1])
            leaves = [x[where].requires_grad_() for x, where in zip((query, key, value), wheres, strict=True)]
            part = dense_attention(*leaves, is_causal=options.causal, window=options.window)
            out[wheres[0]] = part.detach()
            if options.backward:
                found = torch.autograd.grad(part, leaves, grad[wheres[0]])
                for total, where, x in zip(gradients, wheres, found, strict=True):
                    total[where] = x
    return [out, *(gradients if options.backward else ())]
