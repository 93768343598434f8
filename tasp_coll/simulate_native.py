"""What an MPI library's own collectives send: the algorithms that MPICH publishes, step by step.

Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH" (2005), with the
thresholds of MPICH 4's defaults. Other libraries differ, but take their large messages round a ring in rank order too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tasp_coll.simulate_links import Floats, Ints

SHORT_GATHER = 81920  # bytes of the whole result (MPIR_CVAR_ALLGATHER_SHORT_MSG_SIZE)
LONG_GATHER = 524288  # MPIR_CVAR_ALLGATHER_LONG_MSG_SIZE
LONG_SCATTER = 524288  # bytes of the whole input (MPIR_CVAR_REDUCE_SCATTER_COMMUTATIVE_LONG_MSG_SIZE)
SHORT_REDUCE = 2048  # MPIR_CVAR_ALLREDUCE_SHORT_MSG_SIZE
Step = tuple[Ints, Ints, Floats]  # src, dst, parts of a shard


def native_steps(collective: str, ranks: int, shard_bytes: float) -> tuple[list[Step], bool]:
    """The steps of a library's own collective, and whether all of them are as the first one."""
    total = ranks * shard_bytes
    if collective == "allgather":
        if total < LONG_GATHER and _is_power(ranks):
            return _doubling(np.arange(ranks), 1.0), False
        return (_bruck(ranks), False) if total < SHORT_GATHER else (_ring(ranks), True)
    if collective == "reduce_scatter":
        return (_halving(ranks), False) if total < LONG_SCATTER else (_pairwise(ranks), False)
    return _allreduce(ranks, total < SHORT_REDUCE), False


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0


def _step(src: Ints, dst: Ints, share: float | Floats) -> Step:
    return src, dst, np.broadcast_to(np.asarray(share, np.float64), src.shape)


def _widths(limit: int) -> list[int]:
    return [1 << power for power in range((limit - 1).bit_length())]


def _ring(n: int) -> list[Step]:
    at = np.arange(n)
    return [_step(at, (at + 1) % n, 1.0)] * (n - 1)


def _pairwise(n: int) -> list[Step]:
    at = np.arange(n)
    return [_step(at, (at + away) % n, 1.0) for away in range(1, n)]


def _bruck(n: int) -> list[Step]:
    at = np.arange(n)
    return [_step(at, (at - width) % n, float(min(width, n - width))) for width in _widths(n)]


def _doubling(members: Ints, share: float) -> list[Step]:
    """Each pair exchanges all that it has; `members`: a power of two of ranks, which begin with `share` each."""
    at = np.arange(len(members))
    return [_step(members, members[at ^ width], share * width) for width in _widths(len(members))]


def _folded(n: int) -> tuple[Ints, Step | None]:
    """A power of two of ranks that go on, and the step in which the others hand them all that they have."""
    extra = n - (1 << (n.bit_length() - 1))
    left_out = 2 * np.arange(extra)
    members = np.concatenate([left_out + 1, np.arange(2 * extra, n)])
    return members, _step(left_out, left_out + 1, float(n)) if extra else None


def _back(step: Step, share: float) -> Step:
    return _step(step[1], step[0], share)


def _halving(n: int) -> list[Step]:
    members, fold = _folded(n)
    core = _doubling(members, n / len(members))[::-1]
    return [*([fold] if fold else []), *core, *([_back(fold, 1.0)] if fold else [])]


def _allreduce(n: int, short: bool) -> list[Step]:
    members, fold = _folded(n)
    part = n / len(members)
    core: Sequence[Step]
    if short:
        core = [_step(src, dst, float(n)) for src, dst, _ in _doubling(members, part)]
    else:
        core = [*_doubling(members, part)[::-1], *_doubling(members, part)]
    return [*([fold] if fold else []), *core, *([_back(fold, float(n))] if fold else [])]
