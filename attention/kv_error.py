"""What keys and values of few bits cost: the error of attention's results beside exact keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention.function import context_parallel_attention
from attention.kv_bits import Bits
from tasp_coll import Communicator


@dataclass(frozen=True)
class KvError:
    """Of all ranks' results, the same on all of them.

    outputs: root mean square of the errors over that of exact results. largest: the largest error over the largest
    exact element. bits: of an element of keys and values as it travels, scales included; where channels are dropped a
    little less.
    """

    outputs: float
    largest: float
    bits: float


def kv_error(
    query: Tensor, key: Tensor, value: Tensor, *, comm: Communicator, kv_bits: int | str | None, **options: Any
) -> KvError:
    """Attention on keys and values of few bits beside the same on exact ones. Collective; no gradients.

    Arguments are those of `context_parallel_attention`, and so are the errors raised. Call it on
    what a layer of a model passes, to see what a width does there.
    """
    with torch.no_grad():
        exact = context_parallel_attention(query, key, value, comm=comm, **options).double()
        found = context_parallel_attention(query, key, value, comm=comm, kv_bits=kv_bits, **options).double()
    apart = found - exact
    squares = torch.stack([x.square().sum() for x in (apart, exact)])
    peaks = torch.stack([x.abs().amax() if x.numel() else x.new_zeros(()) for x in (apart, exact)])
    squares, peaks = comm.decomposed_allreduce(squares.cpu()), comm.decomposed_allreduce(peaks.cpu(), op="max")
    bits = Bits.of(kv_bits)
    travel = 8.0 * key.element_size() if bits is None else bits.on_wire(key.shape[3])
    return KvError(_share(*squares.sqrt().tolist()), _share(*peaks.tolist()), travel)


def _share(error: float, exact: float) -> float:
    return error / exact if exact else error
