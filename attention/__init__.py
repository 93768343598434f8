"""TASP: attention over sequences that no single device can hold, on the decomposed AllGather.

    import attention
    out = attention.context_parallel_attention(q, k, v, is_causal=True, comm=comm)   # this rank's tokens

Keys and values travel on all link-disjoint rings of the topology while the step before is computed (arXiv 2509.26541),
forward and backward. Stands on tasp_coll's public names; needs torch, which is loaded when a name is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "KvError": "kv_error",
    "Work": "check",
    "check_work": "check",
    "context_parallel_attention": "function",
    "kv_error": "kv_error",
    "record": "tracing",
    "sequence_indices": "sequence",
    "shard_sequence": "sequence",
    "unshard_sequence": "sequence",
}

__all__ = [
    "KvError",
    "Work",
    "check_work",
    "context_parallel_attention",
    "kv_error",
    "record",
    "sequence_indices",
    "shard_sequence",
    "unshard_sequence",
]

if TYPE_CHECKING:
    from attention.check import Work, check_work
    from attention.function import context_parallel_attention
    from attention.kv_error import KvError, kv_error
    from attention.sequence import sequence_indices, shard_sequence, unshard_sequence
    from attention.tracing import record


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__]
