"""TASP: attention over sequences that no single device can hold, on the decomposed AllGather.

    import attention
    out = attention.context_parallel_attention(q, k, v, is_causal=True, comm=comm)   # this rank's tokens

Keys and values travel on all link-disjoint rings of the topology while the step before is computed (arXiv 2509.26541),
forward and backward. Stands on tasp_coll's public names; needs torch.
"""

from __future__ import annotations

from attention.check import Work, check_work
from attention.function import context_parallel_attention
from attention.sequence import sequence_indices, shard_sequence, unshard_sequence
from attention.tracing import record

__all__ = [
    "Work",
    "check_work",
    "context_parallel_attention",
    "record",
    "sequence_indices",
    "shard_sequence",
    "unshard_sequence",
]
