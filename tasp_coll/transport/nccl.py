"""Messages between GPUs: groups of NCCL's sends and receives on a stream. The only module that touches CuPy's NCCL.

One communicator carries all rings: the sends and receives of a step are one group, hence one kernel launch, and with
one communicator the order of launches is the same everywhere, without which NCCL deadlocks (NVIDIA/nccl#195, #1347).
With several, on as many streams, rings do not wait for each other's steps; all ranks launch in the same order still.
CuPy has no nonblocking start-up, so `NcclLinks.join` blocks until all ranks have come: `bootstrap.LinkUp` calls it
from a thread and gives up in time.

CuPy 13 and 14 are alike but for the id, which is a tuple of signed numbers in 13 and bytes in 14.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tasp_coll.errors import CollectiveError
from tasp_coll.executor import Action, Place
from tasp_coll.launches import Launch, Strands


def load() -> Any:
    """CuPy's NCCL module. CollectiveError says what is missing."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise CollectiveError(
            f"arrays on a GPU travel by NCCL, which comes with CuPy ({error}): pip install 'tasp-coll[cuda12]' or "
            "'tasp-coll[cuda13]'"
        ) from error
    if not nccl.available:
        raise CollectiveError("this CuPy was built without NCCL, by which arrays on a GPU travel: install its wheel")
    return nccl


def new_id(nccl: Any) -> bytes:
    """A fresh identity of a communicator, for all ranks to `join` with."""
    identity = nccl.get_unique_id()
    return identity if isinstance(identity, bytes) else bytes(number & 0xFF for number in identity)


class NcclLinks:
    """One rank's end of NCCL communicators, on the CUDA device that was current when they were made.

    Messages of a lane travel by the communicator lane % k, k being their number, so that both ends agree; every rank
    gives a step's groups in the order of communicators.
    """

    name = "nccl"
    has_allgather = orders_streams = True

    def __init__(self, nccl: Any, comms: Sequence[Any], rank: int, size: int) -> None:
        self._nccl, self._comms, self.rank, self.size = nccl, tuple(comms), rank, size
        self.broken: str | None = None

    @classmethod
    def join(cls, nccl: Any, identities: Sequence[bytes], rank: int, size: int) -> NcclLinks:
        """Blocks until all ranks have joined with the same identities, one for each communicator."""
        return cls(nccl, [_joined(nccl, identity, rank, size) for identity in identities], rank, size)

    @property
    def communicators(self) -> int:
        """How many."""
        return len(self._comms)

    def prepare(self, launches: Sequence[Launch]) -> tuple[Launch, ...]:
        """As they are: NCCL needs to know nothing beforehand."""
        return tuple(launches)

    def launch(
        self,
        launches: Sequence[Launch],
        address: Callable[[Place], int],
        act: Callable[[Action], None],
        strands: Strands,
    ) -> None:
        """Give all launches to streams, and wait for none of them.

        address: where a place is on the device. act: gives an action to the first stream.
        """
        self.check()
        strands.meet()
        for launch in launches:
            if launch.together:
                strands.meet()
            for action in launch.actions:
                act(action)
            if launch.actions:
                strands.meet()
            for number, (comm, stream) in enumerate(zip(self._comms, strands.handles, strict=True)):
                mine = [node for node in launch.messages if node.lane % len(self._comms) == number]
                places = [(node, node.place) for node in mine if node.place is not None]
                self._group(
                    comm, [(node.send, node.peer, address(place), place.nbytes) for node, place in places], stream
                )
        strands.meet()

    def greet(self, messages: Sequence[tuple[bool, int, int, int]], stream: int) -> None:
        """Carry these over every communicator, one after another: (is it a send, peer, address, bytes) each."""
        for comm in self._comms:
            self._group(comm, messages, stream)

    def _group(self, comm: Any, messages: Sequence[tuple[bool, int, int, int]], stream: int) -> None:
        """Messages that run at the same time. None may be empty."""
        if not messages:
            return
        nccl = self._nccl
        nccl.groupStart()
        try:
            for is_send, peer, address, nbytes in messages:
                (comm.send if is_send else comm.recv)(address, nbytes, nccl.NCCL_UINT8, peer, stream)
        finally:
            nccl.groupEnd()

    def allgather(self, send: int, recv: int, nbytes: int, stream: int) -> None:
        """NCCL's own: `nbytes` of each rank into `recv`, rank-major."""
        self.check()
        self._comms[0].allGather(send, recv, nbytes, self._nccl.NCCL_UINT8, stream)

    def check(self) -> None:
        """Raise what has gone wrong since: a peer that ended, a link that failed."""
        if self.broken:
            raise CollectiveError(self.broken)
        try:
            for comm in self._comms:
                comm.check_async_error()
        except self._nccl.NcclError as error:
            self.abort(f"NCCL reported an asynchronous error, have ranks ended? ({error})")
            raise CollectiveError(self.broken or "") from error

    def abort(self, why: str) -> None:
        """End everything under way on the device, so that nothing waits for peers that are gone."""
        if not self.broken:
            self.broken = why
            for comm in self._comms:
                comm.abort()  # also, or CuPy would wait in `destroy` when the communicator is dropped

    def close(self) -> None:
        """Give the communicators back, when the device has finished with them. After `abort` there is nothing left."""
        if not self.broken:
            self.broken = "these links are closed"
            for comm in self._comms:
                comm.destroy()


def _joined(nccl: Any, identity: bytes, rank: int, size: int) -> Any:
    try:
        return nccl.NcclCommunicator(size, identity, rank)
    except TypeError:  # CuPy 13 wants signed numbers, and says so before it waits for anyone
        return nccl.NcclCommunicator(size, tuple(byte - 256 if byte > 127 else byte for byte in identity), rank)
