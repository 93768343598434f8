"""What a long run must not use up: memory, descriptors, threads and MPI requests, sampled over the calls."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasp_coll.core import Arena

JUDGED_CALLS = 20_000  # fewer say nothing about memory: caches are still filling
# How much the fitted line may rise over the second half of a run, beyond its own uncertainty: noise of the allocator,
# and of caches that are full.
_ALLOWED = {"rest_bytes": 2 << 20, "descriptors": 0.5, "threads": 0.5, "requests": 200.0}
_SETTLES = "rest_bytes"  # after a step, as where an allocator came to need more


_libc = ctypes.CDLL(None)
_trim = getattr(_libc, "malloc_trim", lambda pad: 0)  # glibc's, as what follows
_set = getattr(_libc, "mallopt", lambda what, value: 0)
_ARENA_MAX, _MMAP_THRESHOLD = -8, -3
REGISTRATIONS = "UCX_RCACHE_ENABLE"  # the environment variable


def steady() -> None:
    """Keep what libraries hoard from looking like a leak of ours. To be called before MPI begins, and threads.

    The allocator shall give back what is freed: `_trim` leaves out the tops of threads' arenas, and what is large would
    stay once its threshold has grown. UCX, which carries the messages of PyPI's MPICH, remembers every address that it
    was given, without end, unless told not to.
    """
    os.environ.setdefault(REGISTRATIONS, "n")
    _set(_ARENA_MAX, 1)
    _set(_MMAP_THRESHOLD, 128 << 10)


@dataclass(frozen=True)
class Sample:
    """One rank after so many calls."""

    calls: int
    seconds: float
    rss_bytes: int
    staging_bytes: int
    descriptors: int
    threads: int
    requests: int

    @property
    def rest_bytes(self) -> int:
        """Resident, less staging: of as many plans as are kept, which may be of now larger, now smaller arrays."""
        return self.rss_bytes - self.staging_bytes

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def sample(calls: int, seconds: float) -> Sample:
    """This process now, less what the allocator keeps for later."""
    from tasp_coll.transport.mpi import requests_alive

    gc.collect()
    _trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        calls,
        seconds,
        pages * os.sysconf("SC_PAGE_SIZE"),
        Arena.all_bytes(),
        len(os.listdir("/proc/self/fd")) - 1,  # but the one that lists them
        len(os.listdir("/proc/self/task")),
        requests_alive(),
    )


@dataclass(frozen=True)
class Drift:
    """A line through the second half of a rank's samples, and one through the last quarter."""

    what: str
    first: float
    last: float
    slope: float  # per call
    rise: float  # over the second half
    uncertain: float  # twice the standard error of that
    later_rise: float  # over the last quarter
    later_uncertain: float
    flat: bool

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def drifts(samples: Sequence[Sample]) -> list[Drift]:
    """Whether anything grew over the second half; of memory, also whether it went on over the last quarter.

    Nothing where a run is too short to tell. The last sample, after all communicators were closed, is for people.
    """
    late = samples[len(samples) // 2 : -1]
    if len(late) < 3 or samples[-1].calls - samples[0].calls < JUDGED_CALLS:
        return []
    return [_drift(late, what, allowed) for what, allowed in _ALLOWED.items()]


def _drift(late: Sequence[Sample], what: str, allowed: float) -> Drift:
    last = late[len(late) // 2 :]
    slope, rise, uncertain = _rise(late, what)
    _, later, unsure = _rise(last, what)
    settled = what == _SETTLES and later - unsure <= allowed / 2  # as a steady leak of half the calls leaves half
    flat = rise - uncertain <= allowed or settled
    return Drift(what, getattr(late[0], what), getattr(late[-1], what), slope, rise, uncertain, later, unsure, flat)


def _rise(samples: Sequence[Sample], what: str) -> tuple[float, float, float]:
    """Of the line through them: the slope, how far it rises, and twice the standard error of that."""
    calls = np.array([each.calls for each in samples], float)
    slope, error = _line(calls, np.array([getattr(each, what) for each in samples], float))
    span = float(calls[-1] - calls[0])
    return slope, slope * span, 2 * error * span


def _line(calls: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[float, float]:
    """Least squares: the slope, and its standard error."""
    away = calls - calls.mean()
    squares = float(away @ away)
    slope = float(away @ values) / squares
    left = values - values.mean() - slope * away
    return slope, (float(left @ left) / max(1, len(calls) - 2) / squares) ** 0.5
