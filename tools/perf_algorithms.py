"""How each algorithm is called: tasp_coll's own, and the peers that it is compared with."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import tasp_coll
from perf_collective import Collective, Place, Unsupported
from perf_options import HEALING, Options
from tasp_coll.bootstrap import timeout_seconds
from tasp_coll.forecast import NATIVE, Case, Choice, call_seconds, forecast, ring_count

if TYPE_CHECKING:
    from mpi4py import MPI

_SIOCGIFADDR = 0x8915


class Ran(NamedTuple):
    """What a call was carried out by, on how many rings (None: not on rings), and tasp_coll's choice, if it was one."""

    chosen: str
    rings: int | None = None
    choice: Choice | None = None


class Algorithm(ABC):
    """One entry of --algo."""

    def __init__(self, name: str, collective: Collective) -> None:
        self.name, self.collective = name, collective

    @abstractmethod
    def bind(self, place: Place) -> Callable[[], Any] | None:
        """The call in this memory; None if it cannot be made in place. Unsupported if it cannot be made at all."""

    def ran(self) -> Ran:
        """What the last call was carried out by."""
        return Ran(self.name)

    def predicted(self, case: Case, ran: Ran) -> float | None:
        """Seconds of such a call by the cost model; None where it knows none."""
        return None

    def close(self) -> None:  # noqa: B027
        """Give back what is its own."""


class Ours(Algorithm):
    """An algorithm of tasp_coll."""

    def __init__(self, name: str, collective: Collective, comm: tasp_coll.Communicator, options: Options) -> None:
        super().__init__(name, collective)
        self._comm = comm
        self._settings: dict[str, Any] = {"algorithm": name, "rings": options.rings if name == "rings" else None}
        if options.queued:
            self._settings["async_op"] = True

    def bind(self, place: Place) -> Callable[[], Any]:
        return partial(self.collective.ours(self._comm), *place.faces, **self._settings)

    def ran(self) -> Ran:
        choice = self._comm.last_choice
        assert choice is not None  # it is for a schedule of the user's own only
        return Ran(choice.algorithm, ring_count(self._comm.topology, choice), choice)

    def predicted(self, case: Case, ran: Ran) -> float | None:
        return None if ran.choice is None else call_seconds(case, ran.choice, self.name)


class Healing(Ours):
    """`auto` on a communicator of its own, whose links heal."""

    def __init__(self, collective: Collective, options: Options) -> None:
        comm = tasp_coll.Communicator(topology=options.topology, timeout=options.timeout, self_heal=True)
        super().__init__("auto", collective, comm, options)
        self.name = HEALING

    def predicted(self, case: Case, ran: Ran) -> None:
        """The model knows nothing of what healing costs."""

    def close(self) -> None:
        self._comm.close()


class Mpi4py(Algorithm):
    """The bare blocking call of mpi4py, on the world's own communicator."""

    def __init__(self, collective: Collective, world: MPI.Intracomm) -> None:
        super().__init__("mpi4py", collective)
        self._world = world

    def bind(self, place: Place) -> Callable[[], Any] | None:
        return self.collective.mpi4py(self._world, place)

    def predicted(self, case: Case, ran: Ran) -> float | None:
        prediction = forecast(case, Choice(NATIVE))
        return None if prediction is None else prediction.seconds


class Gloo(Algorithm):
    """torch.distributed's gloo back end between the ranks of MPI."""

    def __init__(self, collective: Collective, world: MPI.Intracomm, timeout: float | None) -> None:
        super().__init__("gloo", collective)
        self._distributed = join_gloo(world, timeout)

    def bind(self, place: Place) -> Callable[[], Any] | None:
        return self.collective.gloo(self._distributed, place)


def assemble(
    collective: Collective, comm: tasp_coll.Communicator, world: MPI.Intracomm, options: Options
) -> list[Algorithm]:
    """The algorithms that the user named, in that order."""

    def make(name: str) -> Algorithm:
        if name == "mpi4py":
            return Mpi4py(collective, world)
        if name == "gloo":
            return Gloo(collective, world, options.timeout)
        if name == HEALING:
            return Healing(collective, options)
        return Ours(name, collective, comm, options)

    return [make(name) for name in options.algorithms]


def dismiss(algorithms: Sequence[Algorithm]) -> None:
    """End what `assemble` began."""
    for algorithm in algorithms:
        algorithm.close()
    if any(isinstance(algorithm, Gloo) for algorithm in algorithms):
        import torch.distributed as distributed

        distributed.destroy_process_group()


def join_gloo(world: MPI.Intracomm, timeout: float | None) -> Any:
    """torch.distributed with a process group of the same ranks. Rank 0 opens a free port and tells the others."""
    distributed = _distributed(world)
    if distributed.is_initialized():
        return distributed
    limit = timedelta(seconds=timeout_seconds(timeout))
    hosts = world.allgather(os.uname().nodename)
    store = None
    device = os.environ.get("GLOO_SOCKET_IFNAME")  # in a virtual cluster all hosts have this machine's name
    address = (_address_of(device) if device else "127.0.0.1" if len(set(hosts)) == 1 else hosts[0], 0)
    if world.rank == 0:
        store = distributed.TCPStore(*address, world.size, True, limit, wait_for_workers=False)
        address = (address[0], store.port)
    address = world.bcast(address)
    if store is None:
        store = distributed.TCPStore(*address, world.size, False, limit)
    distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=limit)
    return distributed


def _address_of(device: str) -> str:
    """The IPv4 address of a network device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        reply = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", device.encode()[:15]))
    return socket.inet_ntoa(reply[20:24])


def _distributed(world: MPI.Intracomm) -> Any:
    try:
        import torch.distributed as distributed

        missing = "" if distributed.is_available() and distributed.is_gloo_available() else "this torch has no gloo"
    except ImportError as error:
        missing = f"torch cannot be imported ({error}): pip install 'tasp-coll[attention]'"
    told = [(rank, text) for rank, text in enumerate(world.allgather(missing)) if text]
    if told:
        raise Unsupported(f"on rank {told[0][0]} {told[0][1]}")
    return distributed
