"""Links between the GPUs of all ranks: from an agreement on the control messages to links that are warm.

Who is where, and has what, is told first, so that all ranks choose the same transport, and what cannot work is an
error on every rank before a library is asked. Joining blocks: a thread does it, and the engine's timeout ends the
wait. For NCCL rank 0's id goes to all, and only when all have it do they join (NVIDIA/cuDecomp#24); for CUDA IPC rank
0 makes memory that all open. At last every edge carries a byte, since NCCL's first message takes long (214 ms were
seen, NVIDIA/nccl#1487).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from tasp_coll.agreement import Rounds
from tasp_coll.bootstrap import Spread, exchange_texts
from tasp_coll.errors import ArgumentError, CollectiveError, MismatchError
from tasp_coll.launches import Links
from tasp_coll.transport.ipc import EMPTY, IpcLinks
from tasp_coll.transport.ipc_plan import SLOTS
from tasp_coll.transport.nccl import NcclLinks, load, new_id
from tasp_coll.transport.shared import Shared, machine
from tasp_coll.transport.stream_memory import load as load_driver
from tasp_coll.work import Once

T = TypeVar("T")
ENVIRONMENT = "TASP_COLL_GPU_TRANSPORT"
TRANSPORTS = ("auto", "nccl", "ipc")
COMMUNICATORS = "TASP_COLL_NCCL_COMMUNICATORS"
_MOST = 32  # each has buffers and channels of its own on every rank
_TOLD = "arrays on GPUs"


def communicators() -> int:
    """How many NCCL communicators, on as many streams, the user wants: TASP_COLL_NCCL_COMMUNICATORS, else one."""
    asked = os.environ.get(COMMUNICATORS, "1")
    if not (asked.isdecimal() and 1 <= int(asked) <= _MOST):
        raise ArgumentError(f"{COMMUNICATORS} must be an integer from 1 to {_MOST}, got {asked!r}")
    return int(asked)


class Gpu(Protocol):
    """One rank's GPU, as far as starting needs it."""

    cupy: Any

    def identity(self) -> str:
        """The same for ranks that share the GPU, and for no others."""

    def exclusive(self, job: Callable[[], T]) -> T:
        """Run the job with this GPU as the thread's current one."""

    def greet(self, links: Any) -> Callable[[], bool]:
        """Send a byte to every peer; the function that is returned says whether all have come and gone."""


def gpu_transport_named(value: str | None) -> str:
    """The transport that a caller means: None is what TASP_COLL_GPU_TRANSPORT names, else "auto"."""
    source, name = ("gpu_transport", value) if value is not None else (ENVIRONMENT, os.environ.get(ENVIRONMENT))
    if value is None and not name:
        return "auto"
    if name not in TRANSPORTS:
        raise ArgumentError(f"{source} must be one of {', '.join(TRANSPORTS)}, got {name!r}")
    return name


@dataclass
class LinkUp(Once):
    """The operation that links the GPUs up. asked: one of TRANSPORTS. nccl: loads CuPy's module, or says why not."""

    rounds: Rounds
    gpu: Gpu
    asked: str
    timeout: float
    nccl: Callable[[], Any] = load
    name: str = field(default="linking GPUs", init=False)
    phase: str = field(default="telling each other where they are", init=False)
    _joining: bool = field(default=False, init=False)

    def pending(self) -> tuple[set[int], int | None]:
        """Who is waited for."""
        if self._joining:
            return set(range(self.rounds.size)) - {self.rounds.rank}, None
        return self.rounds.pending(), None

    def run(self) -> Generator[bool, None, Links]:
        """The links, warm."""
        name, because = yield from self._meet()
        join = yield from (self._nccl() if name == "nccl" else self._ipc(because))
        self._joining = True
        joining = _Joining(self.gpu, join)
        while joining.is_alive():
            yield False
        links = joining.links()
        self._joining, self.phase = False, "sending the first bytes"
        arrived = self.gpu.greet(links)
        while not arrived():
            links.check()
            yield False
        return links

    def _meet(self) -> Generator[bool, None, tuple[str, str]]:
        """The transport, the same on all ranks, and why it is not the one that is tried first."""
        here = hashlib.blake2b(machine().encode(), digest_size=8).hexdigest()
        host = os.environ.get("NCCL_HOSTID", "")[:80]
        said: dict[str, Any] = {"asked": self.asked, "gpu": self.gpu.identity()[:200], "host": host, "machine": here}
        said["shared"] = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
        try:
            said |= {"nccl": self.nccl().get_version(), "communicators": communicators()}
        except CollectiveError as error:
            said["missing"] = str(error)[:200]
        texts = yield from exchange_texts(self.rounds, json.dumps(said))
        return _chosen([json.loads(text) for text in texts])

    def _nccl(self) -> Generator[bool, None, Callable[[], Links]]:
        """What joins by NCCL."""
        rank, size, nccl, count = self.rounds.rank, self.rounds.size, self.nccl(), communicators()
        text = " ".join(new_id(nccl).hex() for _ in range(count)) if rank == 0 else ""
        identities = [bytes.fromhex(part) for part in (yield from Spread(self.rounds, text).run()).split()]
        yield from exchange_texts(self.rounds, "")
        self.phase = "joining NCCL"
        return lambda: NcclLinks.join(nccl, identities, rank, size)

    def _ipc(self, because: str) -> Generator[bool, None, Callable[[], Links]]:
        """What joins by CUDA IPC. because: why not by NCCL."""
        rank, size = self.rounds.rank, self.rounds.size
        path, shared, driver, failure = "", None, None, ""
        with contextlib.ExitStack() as leaving:
            if rank == 0:
                try:
                    path = Shared.create(size, SLOTS, EMPTY)
                    leaving.callback(os.unlink, path)
                except CollectiveError as error:
                    failure = str(error)
            path = yield from Spread(self.rounds, path).run()
            try:
                driver = load_driver()
                shared = Shared(path, rank, size, SLOTS) if path else None
            except (CollectiveError, OSError) as error:
                failure = str(error)
            texts = yield from exchange_texts(self.rounds, json.dumps([os.getpid(), failure[:200]]))
        said = [json.loads(text) for text in texts]
        failed = [told for told, (_, fault) in enumerate(said) if fault]
        if failed or shared is None or driver is None:
            faults = "; ".join(f"rank {each}: {said[each][1]}" for each in failed)
            raise MismatchError(f"{_TOLD}: ranks cannot be linked by CUDA IPC: {faults}{because}", failed)
        shared.watch([process for process, _ in said])
        self.phase = "joining by CUDA IPC"
        return lambda: IpcLinks.join(self.gpu.cupy, driver, shared, self.timeout)


class _Joining(threading.Thread):
    """Joins, and keeps what came of it."""

    def __init__(self, gpu: Gpu, join: Callable[[], Links]) -> None:
        super().__init__(name="tasp_coll joining GPUs", daemon=True)
        self._gpu, self._join = gpu, join
        self._links: Links | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._links = self._gpu.exclusive(self._join)
        except Exception as error:
            self._error = error

    def links(self) -> Links:
        """When it has ended."""
        if self._links is None:
            raise CollectiveError(f"the ranks' GPUs could not be linked: {self._error}") from self._error
        return self._links


def _chosen(said: list[dict[str, Any]]) -> tuple[str, str]:
    """The transport for these ranks, and why not the other. An error, the same on all of them, if there is none."""
    asked = [told["asked"] for told in said]
    if len(set(asked)) > 1:
        each = ", ".join(f"rank {rank} {name!r}" for rank, name in enumerate(asked))
        raise MismatchError(f"{_TOLD}: all ranks must ask for the same gpu_transport, got {each}")
    by_nccl = None if asked[0] == "ipc" else _against_nccl(said)
    by_ipc = None if asked[0] == "nccl" else _against_ipc(said)
    if asked[0] != "ipc" and by_nccl is None:
        return "nccl", ""
    if asked[0] != "nccl" and by_ipc is None:
        return "ipc", f" (and {by_nccl})" if by_nccl else ""
    if by_nccl is None or by_ipc is None:
        raise by_nccl or by_ipc or AssertionError("one of them is there")
    raise MismatchError(f"{by_nccl}; and {by_ipc}", by_nccl.ranks)


def _against_nccl(said: list[dict[str, Any]]) -> MismatchError | None:
    """Why NCCL cannot link these ranks."""
    failed = [rank for rank, told in enumerate(said) if "missing" in told]
    if failed:
        told = "; ".join(f"rank {rank}: {said[rank]['missing']}" for rank in failed)
        return MismatchError(f"{_TOLD}: not all ranks can take part by NCCL: {told}", failed)
    if len({here["nccl"] for here in said}) > 1:
        each = ", ".join(f"rank {rank} {here['nccl']}" for rank, here in enumerate(said))
        return MismatchError(f"{_TOLD}: all ranks must load the same NCCL, got {each}")
    if len({here["communicators"] for here in said}) > 1:
        each = ", ".join(f"rank {rank} {here['communicators']}" for rank, here in enumerate(said))
        return MismatchError(f"{_TOLD}: all ranks must have the same {COMMUNICATORS}, got {each}")
    seen: dict[tuple[str, str], int] = {}
    for rank, here in enumerate(said):
        first = seen.setdefault((here["gpu"], here["host"]), rank)
        if first != rank and not all(told["shared"] for told in said):
            return MismatchError(
                f"{_TOLD}: ranks {first} and {rank} both use {here['gpu']}, which NCCL refuses: give each rank a GPU "
                "of its own (its local rank's), or take CUDA IPC (gpu_transport 'ipc'), or, for tests of NCCL, give "
                "each rank an NCCL_HOSTID of its own",
                [first, rank],
            )
    return None


def _against_ipc(said: list[dict[str, Any]]) -> MismatchError | None:
    """Why CUDA IPC cannot link these ranks."""
    for rank, here in enumerate(said):
        if here["machine"] != said[0]["machine"]:
            return MismatchError(
                f"{_TOLD}: CUDA IPC (gpu_transport 'ipc') links ranks of one host that share /dev/shm and see each "
                f"other's processes, and rank {rank} ({here['gpu']}) is elsewhere than rank 0 ({said[0]['gpu']})",
                [rank],
            )
    return None
