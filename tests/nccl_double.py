"""A double of `cupy.cuda.nccl` that records what it is given, and carries it out by NCCL's rules in host memory.

Streams are queues. A group is begun when it is at the head of its stream, and leaves it when all its messages are
done; a message is done when both its ends are in groups that have begun; between two ranks the first send meets the
first receive. Nothing is buffered, the strictest order that NCCL allows: what runs here cannot wait in a circle.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import combinations, count
from typing import Any

SIGNATURES = {  # as the docstrings of CuPy 14 have them
    "NcclCommunicator": "int ndev, bytes commId, int rank, NcclConfig config=None",
    "NcclCommunicator.send": "self, intptr_t sendbuf, size_t count, int datatype, int peer, intptr_t stream",
    "NcclCommunicator.recv": "self, intptr_t recvbuf, size_t count, int datatype, int peer, intptr_t stream",
    "NcclCommunicator.allGather": (
        "self, intptr_t sendbuf, intptr_t recvbuf, size_t count, int datatype, intptr_t stream"
    ),
    "NcclCommunicator.check_async_error": "self",
    "NcclCommunicator.abort": "self",
    "NcclCommunicator.destroy": "self",
    "groupStart": "",
    "groupEnd": "",
    "get_unique_id": "",
    "get_version": "",
}


class NcclError(RuntimeError):
    """As CuPy's."""


class Stuck(AssertionError):
    """Streams that wait for each other for ever."""


@dataclass(frozen=True)
class Message:
    send: bool
    peer: int
    address: int
    nbytes: int


@dataclass
class Group:
    """Messages of one rank that run at the same time."""

    rank: int
    comm: bytes
    messages: tuple[Message, ...]
    stream: int = 0
    begun: bool = False
    left: int = 0


Item = Group | Callable[[], object]


@dataclass(frozen=True)
class Entry:
    """What a rank gave to a stream, or what its caller does there, for the proof.

    event: that is recorded, or waited for. uses: (address, bytes, is it written) each.
    """

    stream: int
    event: object = None
    waits: bool = False
    uses: tuple[tuple[int, int, bool], ...] = ()


@dataclass
class Fabric:
    """All ranks' streams and what has been given to them. `run` carries it out."""

    streams: dict[tuple[int, int], deque[Item]] = field(default_factory=lambda: defaultdict(deque))
    records: dict[int, list[Group]] = field(default_factory=lambda: defaultdict(list))
    entries: dict[int, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    captures: dict[tuple[int, int], list[tuple[Item, Entry]]] = field(default_factory=dict)  # by stream
    failed: str | None = None  # an asynchronous error, for all to see
    lock: Any = field(default_factory=threading.RLock)
    running: tuple[int, int] = (0, 0)  # the stream that is being carried out
    _ids: count[int] = field(default_factory=count)
    _posted: dict[tuple[bytes, int, int, bool], deque[tuple[Group, Message]]] = field(
        default_factory=lambda: defaultdict(deque)
    )

    def give(self, rank: int, stream: int, item: Item, entry: Entry) -> None:
        """Put something into a stream."""
        with self.lock:
            if (rank, stream) in self.captures:
                self.captures[rank, stream].append((item, entry))
                return
            self.streams[rank, stream].append(item)
            self.entries[rank].append(entry)

    def give_group(self, group: Group) -> None:
        """Put a group into its stream."""
        uses = tuple((message.address, message.nbytes, not message.send) for message in group.messages)
        with self.lock:
            if (group.rank, group.stream) not in self.captures:
                self.records[group.rank].append(group)
            self.give(group.rank, group.stream, group, Entry(group.stream, uses=uses))

    def note(self, rank: int, stream: int, address: int, nbytes: int, written: bool) -> None:
        """The caller's own work on a stream uses memory."""
        with self.lock:
            self.entries[rank].append(Entry(stream, uses=((address, nbytes, written),)))

    def run(self) -> None:
        """Until all streams are empty; Stuck if they never will be."""
        self.pump()
        heads = {key: queue[0] for key, queue in self.streams.items() if queue}
        if heads:
            raise Stuck(f"streams wait for each other: {heads}")

    def pump(self) -> None:
        """As far as it goes now."""
        with self.lock:
            while sum(self._drain(key) for key in list(self.streams)):
                pass

    def _drain(self, key: tuple[int, int]) -> int:
        """As far as it goes while the others stand still; how many steps."""
        moved, self.running, queue = 0, key, self.streams[key]
        while self._advance(queue):
            moved += 1
        return moved

    def _advance(self, queue: deque[Item]) -> bool:
        if not queue:
            return False
        head = queue[0]
        if not isinstance(head, Group):
            if head() is False:  # it waits for something
                return False
            queue.popleft()
            return True
        moved = not head.begun
        if moved:
            head.begun, head.left = True, len(head.messages)
            for message in head.messages:
                self._post(head, message)
        if not head.left:
            queue.popleft()
            return True
        return moved

    def _post(self, group: Group, message: Message) -> None:
        src, dst = (group.rank, message.peer) if message.send else (message.peer, group.rank)
        waiting = self._posted[group.comm, src, dst, not message.send]
        if not waiting:
            self._posted[group.comm, src, dst, message.send].append((group, message))
            return
        other, its = waiting.popleft()
        send, recv = (message, its) if message.send else (its, message)
        assert send.nbytes == recv.nbytes, f"{src} sends {send.nbytes} bytes, {dst} expects {recv.nbytes}"
        ctypes.memmove(recv.address, send.address, send.nbytes)
        group.left -= 1
        other.left -= 1


class Nccl:
    """What the module `cupy.cuda.nccl` is to one rank. `ids`: "bytes" as in CuPy 14, "tuple" as in 13."""

    available = True
    NCCL_UINT8 = 1
    NcclError = NcclError

    def __init__(self, fabric: Fabric, ids: str = "bytes") -> None:
        self._fabric, self._ids = fabric, ids
        self._group = threading.local()  # as in NCCL, groups are a thread's own
        module = self

        class Bound(NcclCommunicator):
            def __init__(self, ndev: int, commId: bytes, rank: int, config: object = None) -> None:
                super().__init__(module, ndev, commId, rank)

        self.NcclCommunicator = Bound

    def get_version(self) -> int:
        return 22703

    def get_unique_id(self) -> bytes | tuple[int, ...]:
        identity = next(self._fabric._ids).to_bytes(1, "big") + b"\xfe" + bytes(126)
        return identity if self._ids == "bytes" else tuple(byte - 256 if byte > 127 else byte for byte in identity)

    @property
    def opened(self) -> list[tuple[NcclCommunicator, int, Message]] | None:
        """What the thread's open group has been given."""
        return getattr(self._group, "given", None)

    def groupStart(self) -> None:
        assert self.opened is None, "groups are not nested here"
        self._group.given = []

    def groupEnd(self) -> None:
        given, self._group.given = self.opened, None
        assert given is not None
        for comm, stream in dict.fromkeys((comm, stream) for comm, stream, _ in given):
            messages = tuple(message for owner, at, message in given if (owner, at) == (comm, stream))
            self._fabric.give_group(Group(comm.rank, comm.identity, messages, stream))


class NcclCommunicator:
    def __init__(self, module: Nccl, ndev: int, commId: bytes | tuple[int, ...], rank: int) -> None:
        if isinstance(commId, bytes) != (module._ids == "bytes"):
            raise TypeError("Argument 'commId' has incorrect type")
        assert len(commId) == 128
        self.identity = bytes(number & 0xFF for number in commId)
        self._module, self.size, self.rank, self.state = module, ndev, rank, "open"

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._add(Message(True, peer, sendbuf, count), stream)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._add(Message(False, peer, recvbuf, count), stream)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        """As its definition has it, by sends and receives."""
        place = recvbuf + self.rank * count
        if place != sendbuf:
            uses = ((place, count, True), (sendbuf, count, False))
            self._module._fabric.give(self.rank, stream, lambda: _move(place, sendbuf, count), Entry(stream, uses=uses))
        self._module.groupStart()
        for peer in range(self.size):
            if peer != self.rank:
                self.send(sendbuf, count, datatype, peer, stream)
                self.recv(recvbuf + peer * count, count, datatype, peer, stream)
        self._module.groupEnd()

    def check_async_error(self) -> None:
        assert self.state == "open"
        if self._module._fabric.failed:
            raise NcclError(self._module._fabric.failed)

    def abort(self) -> None:
        """Whatever waits on the device is over."""
        assert self.state == "open"
        self.state = "aborted"
        with self._module._fabric.lock:
            for (rank, _), queue in list(self._module._fabric.streams.items()):
                if rank == self.rank:
                    queue.clear()

    def destroy(self) -> None:
        assert self.state == "open", "what was aborted is gone"
        self.state = "destroyed"

    def _add(self, message: Message, stream: int) -> None:
        assert self.state == "open"
        assert self._module.opened is not None, "outside of a group a send would wait for its receive"
        assert 0 <= message.peer < self.size
        assert message.peer != self.rank
        assert message.nbytes > 0
        self._module.opened.append((self, stream, message))


def check_records(records: dict[int, list[Group]]) -> None:
    """Prove that the groups of all ranks end whatever the timing: NCCL's own rules.

    Between two ranks the k-th send and the k-th receive of a communicator are one message of one size, and no group
    waits, by way of messages and of the order in which the rank gave its groups, for itself: even if a GPU ran one at a
    time, on whatever streams they are. And no group writes what it also reads or writes elsewhere.
    """
    ties: dict[tuple[int, int], tuple[int, int]] = {}  # a forest of groups that run at the same time

    def root(group: tuple[int, int]) -> tuple[int, int]:
        while group in ties:
            group = ties[group]
        return group

    sends, receives = _by_pair(records, True), _by_pair(records, False)
    assert set(sends) == set(receives), "a send without its receive, or the other way round"
    for pair, sent in sends.items():
        expected = receives[pair]
        assert [nbytes for _, nbytes in sent] == [nbytes for _, nbytes in expected], f"messages {pair} do not pair up"
        for (one, _), (other, _) in zip(sent, expected, strict=True):
            if root(one) != root(other):
                ties[root(one)] = root(other)
    after: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for rank, groups in records.items():
        for number, group in enumerate(groups):
            _check_memory(group)
            if number:
                after[root((rank, number))].add(root((rank, number - 1)))
    try:
        TopologicalSorter(after).prepare()
    except CycleError as error:
        raise Stuck(f"groups wait for themselves: {error.args[1]}") from error


def check_memory(entries: dict[int, list[Entry]]) -> None:
    """Prove that of two uses of the same memory, one of which writes it, one is always after the other.

    That is by the order on a stream, and by events. A rank waits for no event that it did not record before.
    """
    for rank, given in entries.items():
        before: list[int] = []  # of each entry, a bit for each that comes before it
        latest: dict[int, int] = {}  # of each stream
        recorded: dict[int, int] = {}
        uses: list[tuple[int, int, bool, int]] = []  # from, to, is it written, by which entry
        for number, entry in enumerate(given):
            known = 0
            if entry.stream in latest:
                known |= before[latest[entry.stream]] | 1 << latest[entry.stream]
            if entry.waits:
                assert id(entry.event) in recorded, f"rank {rank} waits for an event that nobody recorded"
                known |= before[recorded[id(entry.event)]] | 1 << recorded[id(entry.event)]
            elif entry.event is not None:
                recorded[id(entry.event)] = number
            before.append(known)
            latest[entry.stream] = number
            for address, nbytes, written in entry.uses:
                for start, stop, wrote, by in uses:
                    if (wrote or written) and address < stop and start < address + nbytes and by != number:
                        assert known >> by & 1, f"rank {rank} uses memory again before its event: {given[by]}, {entry}"
                if nbytes:
                    uses.append((address, address + nbytes, written, number))


def _by_pair(
    records: dict[int, list[Group]], send: bool
) -> dict[tuple[bytes, int, int], list[tuple[tuple[int, int], int]]]:
    found: dict[tuple[bytes, int, int], list[tuple[tuple[int, int], int]]] = defaultdict(list)
    for rank, groups in records.items():
        for number, group in enumerate(groups):
            for message in group.messages:
                if message.send == send:
                    src, dst = (rank, message.peer) if send else (message.peer, rank)
                    found[group.comm, src, dst].append(((rank, number), message.nbytes))
    return found


def _check_memory(group: Group) -> None:
    for one, other in combinations(group.messages, 2):
        if not (one.send and other.send):
            apart = one.address + one.nbytes <= other.address or other.address + other.nbytes <= one.address
            assert apart, f"a group of rank {group.rank} writes memory that it uses elsewhere: {one}, {other}"


def _move(target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)


def ranks_of(fabric: Fabric, size: int, ids: str = "bytes") -> Iterable[Nccl]:
    """The module of each rank."""
    return [Nccl(fabric, ids) for _ in range(size)]
