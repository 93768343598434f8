"""Start-up: from a group of ranks to a transport, and the first agreement between the ranks.

The only module besides the transports that touches mpi4py or torch.distributed, and it does so when a communicator is
made, not before.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from tasp_coll.agreement import Header, Rounds, disagreement
from tasp_coll.board import Board, board_bytes, place
from tasp_coll.core import lanes
from tasp_coll.errors import ArgumentError, ArgumentTypeError, CollectiveError, PeerTimeoutError
from tasp_coll.topology import Topology
from tasp_coll.transport import Transport
from tasp_coll.transport.peer_memory import PeerMemory, Proof
from tasp_coll.transport.shared import nameless, opened
from tasp_coll.work import Once

DEFAULT_TIMEOUT = 600.0
_groups_met: Counter[str] = Counter()  # communicators made of each process group: all its ranks count alike
_WORLD_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def connect(group: Any, timeout: float) -> Transport:
    """The transport between the ranks of `group`.

    None: all ranks that the launcher started, of MPI or of torchrun. An mpi4py communicator, a process group of
    torch.distributed, or one rank of a loopback world. Or another transport, which has a `duplicate` too.
    """
    duplicate = getattr(group, "duplicate", None)
    if callable(duplicate):
        made: Transport = duplicate()
        return made
    if group is None and launched_by_torchrun():
        group = _torch_world()
    if _is_process_group(group):
        return _torch_transport(group, timeout)
    if group is not None and not type(group).__module__.startswith("mpi4py"):
        raise ArgumentTypeError(
            "group must be None, an mpi4py.MPI.Intracomm, a torch.distributed.ProcessGroup or a loopback transport, "
            f"got {type(group).__module__}.{type(group).__qualname__}"
        )
    return _mpi_transport(group, timeout)


def _mpi_transport(group: Any, timeout: float) -> Transport:
    MPI = _mpi()
    from tasp_coll.transport.mpi import ORIGIN, MpiTransport

    ORIGIN.check()
    comm = MPI.COMM_WORLD if group is None else group
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ArgumentTypeError(f"group must be an intracommunicator that this rank is in, got {comm!r}")
    if group is None and (started := ranks_astray(comm.size)):
        raise CollectiveError(
            f"{started} ranks were started, but each is a world of one: the launcher belongs to another MPI than the "
            f"library that mpi4py loads ({MPI.Get_library_version().split(chr(10))[0].strip()}); start them with that "
            "library's mpiexec, or pass group=MPI.COMM_SELF if worlds of one are meant"
        )
    return MpiTransport(_duplicate(comm, timeout), lanes(comm.size) + 1)


def launched_by_torchrun() -> bool:
    """Whether torchrun started this process; it may itself run under srun or mpirun, one on each host."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _torch_world() -> Any:
    """All of torch.distributed's ranks."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        raise CollectiveError(
            "torchrun started this process, so its ranks find each other through torch.distributed: call "
            "torch.distributed.init_process_group() before the communicator is made"
        )
    return dist.group.WORLD


def _is_process_group(group: Any) -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and isinstance(group, dist.ProcessGroup)


def _torch_transport(group: Any, timeout: float) -> Transport:
    """Connections of our own between a process group's ranks, through the store that made the group."""
    import torch.distributed as dist

    from tasp_coll.transport.torch import ORIGIN, TorchTransport

    ORIGIN.check()
    # Groups made before torch had get_group_store are told apart by their names in the default group's store.
    find = getattr(group, "get_group_store", None)
    store = find() if find is not None else dist.distributed_c10d._get_default_store()
    prefix = f"tasp_coll/{group.group_name}/{_groups_met[group.group_name]}"
    made = TorchTransport(dist.PrefixStore(prefix, store), group.rank(), group.size(), timeout)
    _groups_met[group.group_name] += 1  # not where ranks were missing: they may come later, on all ranks
    return made


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise CollectiveError(
            f"mpi4py cannot load an MPI library ({error}): install one, for example pip install 'tasp-coll[mpich]'"
        ) from error
    return MPI


def _duplicate(comm: Any, timeout: float) -> Any:
    """A communicator of our own, so that our messages never meet the caller's. Collective, with the timeout."""
    from tasp_coll.transport.mpi import forsake

    fresh, request = comm.Idup()
    begun, polls = time.monotonic(), 0
    try:
        while not request.Test():
            polls += 1
            if polls > 2:
                os.sched_yield()
            if polls % 64 == 0 and time.monotonic() - begun > timeout:
                others = [rank for rank in range(comm.size) if rank != comm.rank]
                raise PeerTimeoutError(
                    f"Communicator: not all of ranks {others} made theirs within {timeout:.3g} s",
                    peers=others,
                    call="Communicator",
                )
    except BaseException as error:  # Ctrl-C too
        forsake(fresh, request, lost=isinstance(error, PeerTimeoutError))
        raise
    return fresh


def launched_ranks() -> int | None:
    """How many ranks the launcher says that it started, where it says so."""
    found = [os.environ[name] for name in _WORLD_SIZES if os.environ.get(name, "").isdigit()]
    return int(found[0]) if found else None


def ranks_astray(size: int) -> int:
    """How many ranks were started where this one finds itself alone in a world of `size`; 0 if all is well.

    An mpiexec of another MPI than the one that mpi4py loads starts n worlds of one rank.
    """
    launched = launched_ranks() or 0
    return launched if size == 1 < launched else 0


def timeout_seconds(value: float | None) -> float:
    """The timeout that a caller means: None is TASP_COLL_TIMEOUT, else 600 s."""
    named = os.environ.get("TASP_COLL_TIMEOUT")
    source, text = ("timeout", value) if value is not None else ("environment variable TASP_COLL_TIMEOUT", named)
    if text is None or text == "":
        return DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except (TypeError, ValueError):
        seconds = -1.0
    if not seconds > 0 or isinstance(value, bool):
        raise ArgumentError(f"{source} must be a number of seconds > 0, got {text!r}")
    return seconds


@dataclass
class _Round(Once):
    """What the first operations share."""

    rounds: Rounds
    name = "Communicator"
    phase = "making a communicator"

    def pending(self) -> tuple[set[int], int | None]:
        """Who is waited for."""
        return self.rounds.pending(), None


class Wishes(NamedTuple):
    """What a rank wants of a communicator. given: someone named the topology. shares: it may share memory with others.
    error: why it cannot take part.
    """

    topology: Topology | None
    given: bool
    self_heal: bool
    checksums: bool
    shares: bool
    error: CollectiveError | None


@dataclass
class Join(_Round):
    """The operation that makes a communicator: same wishes, same version, and where everybody is."""

    wishes: Wishes

    def run(self) -> Generator[bool, None, tuple[str, ...]]:
        """The host names, by rank."""
        from tasp_coll import __version__

        wishes, error = self.wishes, self.wishes.error
        said: dict[str, object] = {"call": self.name}
        if error is not None or wishes.topology is None:
            said["error"] = f"{type(error).__name__}: {error}"[:400]
        else:
            said["topology"] = f"{wishes.topology.name[:80]} ({wishes.topology.fingerprint})"
            said["given"] = wishes.given
            said["self_heal"] = wishes.self_heal
            said["TASP_COLL_CHECKSUM"] = int(wishes.checksums)
        said["version"] = __version__
        host = socket.gethostname()[:80]
        texts = yield from exchange_texts(self.rounds, json.dumps({**said, "host": host}))
        all_said = [json.loads(text) for text in texts]
        hosts = tuple(told.pop("host") for told in all_said)
        if any(told != all_said[0] for told in all_said) or "error" in said:
            if error is not None and all("error" in told for told in all_said):
                raise error
            raise disagreement([json.dumps(told) for told in all_said]) from error
        return hosts


def exchange_texts(rounds: Rounds, text: str) -> Generator[bool, None, list[str]]:
    """Every rank's text, each short enough for one round."""
    raw = text.encode()
    if len(raw) > rounds.capacity:
        raise CollectiveError(f"a text of {len(raw)} bytes is too long for a round of {rounds.capacity}")
    rounds.post(Header(b"text".ljust(16), len(raw)).packed(), raw)
    while not rounds.poll():
        yield False
    return [rounds.text(rank) for rank in range(rounds.size)]


@dataclass
class Meet(_Round):
    """The operation after which ranks that all share memory use it for their rounds. wanted: by this rank."""

    wanted: bool
    transport: Transport

    def run(self) -> Generator[bool, None, tuple[Rounds, PeerMemory | None]]:
        """The rounds from now on: these, or by way of a board; and that by which ranks read each other's memory."""
        here = place() if self.wanted else ""
        mark = blake2b(here.encode(), digest_size=16).hexdigest() if here else ""
        marks = yield from exchange_texts(self.rounds, mark)
        if "" in marks or len(set(marks)) > 1:
            return self.rounds, None
        total, path, memory = board_bytes(self.rounds.size), "", None
        with ExitStack() as leaving:
            if self.rounds.rank == 0:
                with suppress(OSError):
                    descriptor, path = nameless(total)
                    leaving.callback(os.close, descriptor)
            path = (yield from exchange_texts(self.rounds, path))[0]
            with suppress(OSError, ValueError):
                memory = opened(path, total) if path else None
            texts = yield from exchange_texts(self.rounds, "" if memory is None else "here")
        if memory is None or "" in texts:
            return self.rounds, None
        peer_memory = yield from self._peer_memory()
        self.rounds.close()
        return Board(self.transport, memory), peer_memory

    def _peer_memory(self) -> Generator[bool, None, PeerMemory | None]:
        """None where not all can read the memory of all."""
        mine, _held = Proof.laid()
        texts = yield from exchange_texts(self.rounds, json.dumps([mine.process, mine.address, mine.content.hex()]))
        told = [json.loads(text) for text in texts]
        proofs = [Proof(process, address, bytes.fromhex(content)) for process, address, content in told]
        found = None
        with suppress(OSError):
            found = PeerMemory([proof.process for proof in proofs])
        works = found is not None and found.works(proofs)
        texts = yield from exchange_texts(self.rounds, "works" if works else "")
        return found if all(texts) else None


@dataclass
class Spread(_Round):
    """The operation that gives every rank rank 0's text, of any length."""

    text: str

    def run(self) -> Generator[bool, None, str]:
        """Rank 0's text."""
        room, gathered, more = self.rounds.capacity // 6 - 16, "", True
        while more:
            at = len(gathered)
            piece = json.dumps([self.text[at : at + room], at + room < len(self.text)])
            texts = yield from exchange_texts(self.rounds, piece if self.rounds.rank == 0 else "")
            part, more = json.loads(texts[0])
            gathered += part
        return gathered
