"""What break_peers.py breaks: the calls of each rank, what is done to them, and what a right result would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RANKS = 4
ODD = 2  # the rank that does otherwise, is stopped, is killed
LINK = (0, 1)  # the one that is cut or slowed
FAULT_S = 0.5  # after all ranks began
_ROW = 16  # elements
_LARGE, _SLOW = 9 << 20, 1 << 20  # bytes of each rank, which one ring carries in 3.8 and 0.42 s at LINK_MBIT
LINK_MBIT = 60.0

TASP, HEAL, MPI, GLOO, DETAIL = "tasp", "tasp+heal", "mpi", "gloo", "gloo+detail"
SYSTEMS = {
    TASP: "tasp_coll over MPI",
    HEAL: "the same with self_heal=True",
    MPI: "mpi4py's Allgather and Allreduce, bare",
    GLOO: "torch.distributed with gloo, timeout= set",
    DETAIL: "the same with TORCH_DISTRIBUTED_DEBUG=DETAIL",
}
_PLAIN = (TASP, MPI, GLOO, DETAIL)


@dataclass(frozen=True)
class Call:
    """One collective call of one rank. Ranks mean the same call by the same `key`; `more`: times the usual rows."""

    collective: str = "allgather"
    key: str = "a"
    more: int = 1
    dtype: str = "float32"
    op: str = "sum"


@dataclass(frozen=True)
class Case:
    """Calls of the ranks, those of rank ODD where they differ, and what befalls them.

    fault: "stop", "kill" (of rank ODD), "down", "slower" (of LINK), or nothing. repeat: call until something happens.
    nbytes: of each rank; None: as asked for. patience: times the limit that a rank has.
    """

    name: str
    about: str
    calls: tuple[Call, ...] = (Call(),)
    odd: tuple[Call, ...] | None = None
    fault: str = ""
    repeat: bool = False
    nbytes: int | None = None
    patience: int = 1
    systems: tuple[str, ...] = _PLAIN

    @property
    def on_cluster(self) -> bool:
        """Whether links must be real."""
        return self.fault in ("down", "slower")

    @property
    def culprits(self) -> tuple[int, ...]:
        """The ranks that a good error names."""
        return LINK if self.on_cluster else (ODD,)

    @property
    def witnesses(self) -> tuple[int, ...]:
        """The ranks that can say what they saw."""
        absent = self.fault in ("stop", "kill") or self.odd == ()
        return tuple(rank for rank in range(RANKS) if not (absent and rank == ODD))

    def of(self, rank: int) -> tuple[Call, ...]:
        """The calls of one rank."""
        return self.calls if self.odd is None or rank != ODD else self.odd

    def send(self, rank: int, call: Call, nbytes: int) -> NDArray[np.generic]:
        """What a rank passes: small integers, whose sums are exact. (rows, _ROW)"""
        rows = call.more * max(1, nbytes // (_ROW * 4))
        return np.full((rows, _ROW), 1 + rank + 10 * (ord(call.key) - ord("a")), call.dtype)

    def right(self, call: Call, nbytes: int) -> NDArray[np.generic]:
        """What the ranks' calls that share this one's key ought to give, for the rank that makes this one."""
        made = [{own.key: own for own in self.of(rank)}.get(call.key) for rank in range(RANKS)]
        sends = [self.send(rank, own, nbytes) for rank, own in enumerate(made) if own is not None]
        if call.collective == "allgather":
            return np.concatenate(sends)
        reduce = np.add if call.op == "sum" else np.maximum
        return reduce.reduce([send.astype(call.dtype) for send in sends]).astype(call.dtype)


_GATHER, _SUM = Call(), Call("allreduce")


def _broken(name: str, about: str, fault: str, call: Call = _GATHER) -> Case:
    """Calls without end, during which rank ODD is stopped or killed."""
    return Case(name, about, (call,), fault=fault, repeat=True, nbytes=4 << 20)


_RANKS = (
    _broken("stopped", "a rank stopped (SIGSTOP) during AllGathers", "stop"),
    _broken("killed", "a rank killed (SIGKILL) during AllGathers", "kill"),
    _broken("buffers", "a rank stopped during AllReduces: is send intact?", "stop", _SUM),
    Case("never", "a rank that never calls", odd=()),
)
_LINKS = (
    Case("cut", "a link cut during an AllGather", fault="down", nbytes=_LARGE, systems=tuple(SYSTEMS)),
    Case(
        "slow",
        "a link 10 times slower, then 6 AllGathers",
        (Call(),) * 6,
        None,
        "slower",
        nbytes=_SLOW,
        patience=3,
        systems=tuple(SYSTEMS),
    ),
)
_CALLS = (
    Case("shapes", "one rank passes twice the rows to AllGather", odd=(Call(more=2),)),
    Case("dtypes", "int32 among float32 in AllReduce", (_SUM,), (Call("allreduce", dtype="int32"),)),
    Case("operations", "AllReduce among AllGathers", odd=(_SUM,)),
    Case("redop", "max among sums in AllReduce", (_SUM,), (Call("allreduce", op="max"),)),
    Case(
        "order",
        "AllGather and AllReduce, in the other order on one rank",
        (Call(), Call("allreduce", "b")),
        (Call("allreduce", "b"), Call()),
    ),
    Case(
        "alike",
        "two AllGathers that look alike, in the other order on one rank",
        (Call(), Call(key="b")),
        (Call(key="b"), Call()),
    ),
)
CASES = {case.name: case for case in (*_LINKS, *_RANKS, *_CALLS)}


@dataclass(frozen=True)
class Seen:
    """What one rank saw. outcome: "error", "right" or "wrong". at: on the machine's monotonic clock.

    message: of the error, or of the last warning. intact: whether all that it passed is as it was. slowdown: time of
    the last call over that of one in health.
    """

    rank: int
    outcome: str
    at: float
    message: str = ""
    intact: bool = True
    slowdown: float = 1.0


@dataclass(frozen=True)
class Ran:
    """A job. began: when the fault came, or else the calls. ended: when the launcher ended, with what status.

    log: what the job printed last. trouble: why there is nothing to judge; skipped: and it is the machine's fault.
    """

    seen: Sequence[Seen] = ()
    began: float = 0.0
    ended: float | None = None
    status: int = 0
    log: str = ""
    trouble: str = ""
    skipped: bool = False
