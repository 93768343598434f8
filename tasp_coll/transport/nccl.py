"""Messages between GPUs: groups of NCCL's sends and receives on a stream. The only module that touches CuPy's NCCL.

One communicator carries all rings: the sends and receives of a step are one group, hence one kernel launch, and with
one communicator the order of launches is the same everywhere, without which NCCL deadlocks (NVIDIA/nccl#195, #1347).
CuPy has no nonblocking start-up, so `NcclLinks.join` blocks until all ranks have come: `bootstrap.LinkUp` calls it
from a thread and gives up in time.

CuPy 13 and 14 are alike but for the id, which is a tuple of signed numbers in 13 and bytes in 14.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tasp_coll.errors import CollectiveError
from tasp_coll.executor import Action, Place
from tasp_coll.launches import Launch


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
    """One rank's end of an NCCL communicator, on the CUDA device that was current when it was made."""

    name = "nccl"
    has_allgather = True

    def __init__(self, nccl: Any, comm: Any, rank: int, size: int) -> None:
        self._nccl, self._comm, self.rank, self.size = nccl, comm, rank, size
        self.broken: str | None = None

    @classmethod
    def join(cls, nccl: Any, identity: bytes, rank: int, size: int) -> NcclLinks:
        """Blocks until all ranks have joined with the same identity."""
        try:
            comm = nccl.NcclCommunicator(size, identity, rank)
        except TypeError:  # CuPy 13 wants signed numbers, and says so before it waits for anyone
            comm = nccl.NcclCommunicator(size, tuple(byte - 256 if byte > 127 else byte for byte in identity), rank)
        return cls(nccl, comm, rank, size)

    def prepare(self, launches: Sequence[Launch]) -> tuple[Launch, ...]:
        """As they are: NCCL needs to know nothing beforehand."""
        return tuple(launches)

    def launch(
        self,
        launches: Sequence[Launch],
        address: Callable[[Place], int],
        act: Callable[[Action], None],
        stream: int,
    ) -> None:
        """Give all launches to a stream, and wait for none of them.

        address: where a place is on the device. act: gives an action to the same stream. stream: its handle.
        """
        self.check()
        for launch in launches:
            for action in launch.actions:
                act(action)
            if launch.messages:
                places = [(node, node.place) for node in launch.messages if node.place is not None]
                self.group([(node.send, node.peer, address(place), place.nbytes) for node, place in places], stream)

    def group(self, messages: Sequence[tuple[bool, int, int, int]], stream: int) -> None:
        """Messages that run at the same time: (is it a send, peer, address, bytes) each. None may be empty."""
        nccl, comm = self._nccl, self._comm
        nccl.groupStart()
        try:
            for is_send, peer, address, nbytes in messages:
                (comm.send if is_send else comm.recv)(address, nbytes, nccl.NCCL_UINT8, peer, stream)
        finally:
            nccl.groupEnd()

    def allgather(self, send: int, recv: int, nbytes: int, stream: int) -> None:
        """NCCL's own: `nbytes` of each rank into `recv`, rank-major."""
        self.check()
        self._comm.allGather(send, recv, nbytes, self._nccl.NCCL_UINT8, stream)

    def check(self) -> None:
        """Raise what has gone wrong since: a peer that ended, a link that failed."""
        if self.broken:
            raise CollectiveError(self.broken)
        try:
            self._comm.check_async_error()
        except self._nccl.NcclError as error:
            self.abort(f"NCCL reported an asynchronous error, have ranks ended? ({error})")
            raise CollectiveError(self.broken or "") from error

    def abort(self, why: str) -> None:
        """End everything under way on the device, so that nothing waits for peers that are gone."""
        if not self.broken:
            self.broken = why
            self._comm.abort()  # also, or CuPy would wait in `destroy` when the communicator is dropped

    def close(self) -> None:
        """Give the communicator back, when the device has finished with it. After `abort` there is nothing left."""
        if not self.broken:
            self.broken = "these links are closed"
            self._comm.destroy()
