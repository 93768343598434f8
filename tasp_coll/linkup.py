"""Links between the GPUs of all ranks: from an agreement on the control messages to an NCCL communicator.

Who is where is told first, so that what cannot work is an error on every rank before NCCL is asked. Then rank 0's id
goes to all, and only when all have it do they join (NVIDIA/cuDecomp#24). Joining blocks inside NCCL: a thread does it,
and the engine's timeout ends the wait. At last every edge carries a byte, since its first message takes long
(214 ms were seen, NVIDIA/nccl#1487).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tasp_coll.agreement import Rounds
from tasp_coll.bootstrap import Spread, exchange_texts
from tasp_coll.errors import ArgumentError, CollectiveError, MismatchError
from tasp_coll.transport.nccl import NcclLinks, new_id
from tasp_coll.work import Once

COMMUNICATORS = "TASP_COLL_NCCL_COMMUNICATORS"
_MOST = 32  # each has buffers and channels of its own on every rank


def communicators() -> int:
    """How many NCCL communicators, on as many streams, the user wants: TASP_COLL_NCCL_COMMUNICATORS, else one."""
    asked = os.environ.get(COMMUNICATORS, "1")
    if not (asked.isdecimal() and 1 <= int(asked) <= _MOST):
        raise ArgumentError(f"{COMMUNICATORS} must be an integer from 1 to {_MOST}, got {asked!r}")
    return int(asked)


class Gpu(Protocol):
    """One rank's GPU, as far as starting needs it."""

    def identity(self) -> str:
        """The same for ranks that share the GPU, and for no others."""

    def exclusive(self, job: Callable[[], NcclLinks]) -> NcclLinks:
        """Run the job with this GPU as the thread's current one."""

    def greet(self, links: NcclLinks) -> Callable[[], bool]:
        """Send a byte to every peer; the function that is returned says whether all have come and gone."""


@dataclass
class LinkUp(Once):
    """The operation that links the GPUs up. nccl: CuPy's module, or the error that says why there is none."""

    rounds: Rounds
    nccl: Any
    gpu: Gpu | None
    name: str = field(default="linking GPUs", init=False)
    phase: str = field(default="telling each other where they are", init=False)

    def pending(self) -> tuple[set[int], int | None]:
        """Who is waited for."""
        if self.phase == "joining NCCL":
            return set(range(self.rounds.size)) - {self.rounds.rank}, None
        return self.rounds.pending(), None

    def run(self) -> Generator[bool, None, NcclLinks]:
        """The links, warm."""
        yield from self._meet()
        rank, size, count = self.rounds.rank, self.rounds.size, communicators()
        text = " ".join(new_id(self.nccl).hex() for _ in range(count)) if rank == 0 else ""
        identities = [bytes.fromhex(part) for part in (yield from Spread(self.rounds, text).run()).split()]
        yield from exchange_texts(self.rounds, "")
        self.phase = "joining NCCL"
        assert self.gpu is not None
        joining = _Joining(self.gpu, lambda: NcclLinks.join(self.nccl, identities, rank, size))
        while joining.is_alive():
            yield False
        links = joining.links()
        self.phase = "sending the first bytes"
        arrived = self.gpu.greet(links)
        while not arrived():
            links.check()
            yield False
        return links

    def _meet(self) -> Generator[bool, None, None]:
        """All ranks have NCCL, of one version, and a GPU each."""
        said: dict[str, Any] = {"call": self.name}
        if isinstance(self.nccl, CollectiveError) or self.gpu is None:
            said["error"] = f"CollectiveError: {self.nccl}"[:400]
        else:
            host = os.environ.get("NCCL_HOSTID", "")
            said |= {"nccl": self.nccl.get_version(), "gpu": self.gpu.identity()[:200], "host": host[:80]}
            try:
                said["communicators"] = communicators()
            except ArgumentError as error:
                said["error"] = f"ArgumentError: {error}"
        texts = yield from exchange_texts(self.rounds, json.dumps(said))
        problem = _problem([json.loads(text) for text in texts])
        if problem is not None:
            raise problem


class _Joining(threading.Thread):
    """Joins, and keeps what came of it."""

    def __init__(self, gpu: Gpu, join: Callable[[], NcclLinks]) -> None:
        super().__init__(name="tasp_coll joining NCCL", daemon=True)
        self._gpu, self._join = gpu, join
        self._links: NcclLinks | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._links = self._gpu.exclusive(self._join)
        except Exception as error:
            self._error = error

    def links(self) -> NcclLinks:
        """When it has ended."""
        if self._links is None:
            raise CollectiveError(f"NCCL did not link the ranks: {self._error}") from self._error
        return self._links


def _problem(said: list[dict[str, Any]]) -> CollectiveError | None:
    """Why these ranks cannot be linked, the same on all of them."""
    failed = [rank for rank, told in enumerate(said) if "error" in told]
    if failed:
        told = "; ".join(f"rank {rank}: {said[rank]['error']}" for rank in failed)
        return MismatchError(f"arrays on GPUs: not all ranks can take part: {told}", failed)
    versions = {here["nccl"] for here in said}
    if len(versions) > 1:
        each = ", ".join(f"rank {rank} {here['nccl']}" for rank, here in enumerate(said))
        return MismatchError(f"arrays on GPUs: all ranks must load the same NCCL, got {each}")
    if len({here["communicators"] for here in said}) > 1:
        each = ", ".join(f"rank {rank} {here['communicators']}" for rank, here in enumerate(said))
        return MismatchError(f"arrays on GPUs: all ranks must have the same {COMMUNICATORS}, got {each}")
    seen: dict[tuple[str, str], int] = {}
    for rank, here in enumerate(said):
        first = seen.setdefault((here["gpu"], here["host"]), rank)
        if first != rank and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
            return MismatchError(
                f"arrays on GPUs: ranks {first} and {rank} both use {here['gpu']}, which NCCL refuses: give each rank "
                "a GPU of its own (its local rank's), or, for tests, an NCCL_HOSTID of its own",
                [first, rank],
            )
    return None
