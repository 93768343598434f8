"""How many bits keys and values get where: what an error costs the result, and widths within a budget.

Own derivation. Of a query's result o = sum_j p_j v_j, p the softmax of scale * q.k_j, errors dk_j and dv_j that are
independent of each other and zero in the mean change, to first order,

    |do|^2 = sum_j p_j^2 |v_j - o|^2 * scale^2 * sum_c q_c^2 dk_jc^2  +  sum_j p_j^2 sum_c dv_jc^2

in the mean: keys act through the scores, values directly. What stands before dk_c^2 and dv_c^2 is the weight of a
channel of a head, taken as a mean over some of each rank's queries on its own keys, whatever the mask hides of them.
A channel in units of its root mean square (rms) then costs weight * rms^2 * E(width), where E is the error of a normal
distribution's numbers with a scale for each token's group. Groups are made of channels that cost alike, and widths
taken by the gain per bit, best first: for a convex E that is the least cost for the bits (Fox, Operations Research 14,
1966).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention.kernel_parts import expanded, in_rows
from attention.kv_bits import Bits, group_of, padded
from attention.wire_bits import Codec
from dynasty.integers import WIDTHS

_QUERIES, _KEYS = 16, 512  # of each rank and head, that the weights are taken from
_PEAK = 2.1  # of 32 numbers of a normal distribution, over its root mean square
_LARGEST = 1e30  # of a sum that travels

Array = NDArray[np.float64]


def codec_for(comm: Any, bits: Bits, query: Tensor, key: Tensor, value: Tensor, scale: float, tokens: int) -> Codec:
    """The codec of a call, the same on all ranks. Collective: one small sum over all ranks.

    query (B, H, L, D), key and value (B, Hkv, L, D) of this rank; tokens: of all ranks.
    """
    heads, dim = key.shape[1], key.shape[3]
    weights = _weights(query, key, value, scale) if bits.dynamic else torch.zeros((2, heads, dim))
    squares = torch.stack([x.float().square().sum((0, 2)) for x in (key, value)])
    sums = torch.stack([squares.cpu(), weights.cpu()]).nan_to_num(0.0).clamp_max(_LARGEST)
    shared, weights = comm.decomposed_allreduce(sums)
    mean_squares = shared.double().numpy() / max(key.shape[0] * tokens, 1)
    short = padded(dim) - dim
    mean_squares, costs = (
        np.pad(x, ((0, 0), (0, 0), (0, short))) for x in (mean_squares, mean_squares * weights.double().numpy())
    )
    order, widths = _laid_out(costs, bits, group_of(dim))
    rms = np.sqrt(mean_squares).reshape(-1)[order].astype(np.float32)
    device = key.device
    held = torch.from_numpy(np.where(rms > 0, rms, 1)).to(device)
    return Codec(heads, dim, torch.from_numpy(order).to(device), widths, held)


def _weights(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """See above: (2, Hkv, D) float32, of the keys' and the values' channels, times this rank's tokens."""
    tokens, heads = query.shape[2], key.shape[1]
    if not tokens:
        return torch.zeros((2, heads, key.shape[3]))
    step = -(-tokens // _KEYS)
    q = query[:, :, :: -(-tokens // _QUERIES)].float()
    k, v = (expanded(in_rows(x[:, :, ::step]).float(), query.shape[1]) for x in (key, value))
    p = (q @ k.transpose(2, 3) * scale).softmax(3)
    o, squared = p @ v, p.square()
    plain = squared.sum(3)
    # |v - o|^2 = |v|^2 - 2 v.o + |o|^2
    apart = (squared @ v.square().sum(3, keepdim=True)).squeeze(3)
    apart += (o.square().sum(3) * plain) - 2 * (o * (squared @ v)).sum(3)
    of_keys = (apart.clamp_min(0).unsqueeze(3) * q.square()).mean(2) * scale**2
    of_values = plain.mean(2, keepdim=True).expand_as(of_keys)
    both = torch.stack([of_keys, of_values]).unflatten(2, (heads, -1))  # query heads that share a head of keys
    return both.sum((1, 3)) * tokens


def _laid_out(costs: Array, bits: Bits, group: int) -> tuple[NDArray[np.int64], tuple[tuple[int, int], ...]]:
    """Channels in the order of the wire, and (width, groups) of it. costs: (2, heads, channels).

    Ranks must come to the same on any machine, so that nothing is added up here but by `fsum`.
    """
    order = np.argsort(-costs, axis=2, kind="stable")
    starts = np.arange(0, costs.size, costs.shape[2]).reshape(*costs.shape[:2], 1)
    groups = (order + starts).reshape(-1, group)
    of_groups = np.array([math.fsum(each) for each in costs.reshape(-1)[groups].tolist()])
    widths = allocated(of_groups, bits.mean) if bits.dynamic else np.full(len(groups), int(bits.mean))
    kept = groups[np.argsort(-widths, kind="stable")][: np.count_nonzero(widths)]
    found = tuple((width, int((widths == width).sum())) for width in reversed(WIDTHS) if (widths == width).any())
    return kept.reshape(-1), found


def allocated(costs: Array, mean: float) -> NDArray[np.int64]:
    """A width for each group, 0 or 2 to 8, no more than `mean` in the mean. costs: (groups,) of an error of 1."""
    ladder = np.array([0, *WIDTHS])
    errors = np.array([1.0, *((_PEAK / (2 ** (width - 1) - 1)) ** 2 / 12 for width in WIDTHS)])
    gains = np.minimum.accumulate(-np.diff(errors) / np.diff(ladder))  # by bit, never rising
    offers = (costs[:, None] * gains).reshape(-1)
    taken = np.argsort(-offers, kind="stable")
    prices = np.tile(np.diff(ladder), len(costs))[taken]
    bought = taken[: np.searchsorted(np.cumsum(prices), mean * len(costs), side="right")]
    return ladder[np.bincount(bought // len(gains), minlength=len(costs))]
