"""Messages between the GPUs of one host by CUDA IPC: copy engines carry them, and no kernel runs.

A send is a copy into the sender's outbox, memory of our own that every peer has open (`ipc_plan`); a receive is a copy
out of it. An outbox is ours because handles exist for whole allocations only, while the caller's arrays are parts of
pools that torch and CuPy give back and take again. It costs one copy inside the GPU for everything that is sent, once
where it goes to several peers.

The streams wait for each other by flags in memory that the host's ranks share (`shared`, `stream_memory`): one for
each slot, sender and receiver. The sender waits until it is EMPTY, copies, and sets it FULL; the receiver waits until
it is FULL, copies, and sets it EMPTY. The two take turns, so no write is lost, and the values are the same in every
call, so that a CUDA graph can repeat them. Both are bits: a word that has both lets everyone pass, by which a rank
that gives up frees its streams.

Nothing can wait in a circle: what a rank lays down in round i waits for what its peers fetched in earlier rounds
only, what it fetches in round i for what they laid down in round i, and every rank gives its streams the rounds in
order. That holds even where the GPU carries out all streams of a process one after another. The fetches of a round
have a stream for each peer, as one stream would use one copy engine at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tasp_coll.errors import CollectiveError
from tasp_coll.executor import Action, Node, Place
from tasp_coll.launches import Launch, Strands
from tasp_coll.transport.ipc_plan import SLOTS, Fetch, Outgoing, PlannedLaunch, Round, planned
from tasp_coll.transport.shared import ALIVE, CLOSED, GAVE_UP, Shared
from tasp_coll.transport.stream_memory import Operations, StreamMemory, waits, writes

EMPTY, FULL = 1, 2
SLOT_BYTES = 16 << 20
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 1e-3, 0.05
_TAKEN_SECONDS, _CLOSED_SECONDS = 10.0, 1.0


class IpcLinks:
    """One rank's outbox and its peers', on the CUDA device that was current when it was made."""

    name = "ipc"
    has_allgather = orders_streams = False
    communicators = 1

    def __init__(self, cupy: Any, driver: StreamMemory, shared: Shared, timeout: float, slot_bytes: int) -> None:
        self._runtime, self._cuda, self._driver, self._shared = cupy.cuda.runtime, cupy.cuda, driver, shared
        self.rank, self.size = shared.rank, shared.size
        self.broken: str | None = None
        self._timeout, self._slot_bytes = timeout, slot_bytes
        self._peers = [peer for peer in range(self.size) if peer != self.rank]
        self._outbox = 0
        self._outboxes: dict[int, int] = {}  # of the peers, where they are open here

    @classmethod
    def join(
        cls, cupy: Any, driver: StreamMemory, shared: Shared, timeout: float, slot_bytes: int = SLOT_BYTES
    ) -> IpcLinks:
        """Blocks until all ranks have joined. slot_bytes: half an outbox; the same on all ranks.

        CollectiveError on every rank if one cannot; PeerTimeoutError if one does not answer.
        """
        links = cls(cupy, driver, shared, timeout, slot_bytes)
        handle = links._agreed(links._offer, "offering memory by CUDA IPC")
        links._agreed(lambda: links._open(handle), "opening memory of peers by CUDA IPC")
        links._prepare_flags()
        return links

    def _agreed(self, job: Callable[[], bytes], why: str) -> list[bytes]:
        """Do it on all ranks: every rank's result, or the same error on all."""
        failure: Exception | None = None
        try:
            text = b"+" + job()
        except Exception as error:  # CuPy's, for whatever the driver says
            failure, text = error, b"-" + str(error).encode()
        said = self._shared.exchange(text, self._timeout, why)
        failed = [f"rank {rank}: {each[1:].decode()}" for rank, each in enumerate(said) if each[:1] == b"-"]
        if failed:
            raise CollectiveError(f"{why} failed: {'; '.join(failed)}") from failure
        return [each[1:] for each in said]

    def _offer(self) -> bytes:
        """An outbox, flags that the device reaches, and a stream for each peer; the handle of the outbox."""
        runtime, cuda, shared = self._runtime, self._cuda, self._shared
        self._outbox = runtime.malloc(SLOTS * self._slot_bytes)
        # The bits for registering memory are those for allocating it, of which CuPy has the names.
        flags = runtime.hostAllocMapped | runtime.hostAllocPortable
        runtime.hostRegister(shared.address, shared.flag_bytes, flags)
        self._flags = int(runtime.pointerGetAttributes(shared.address).devicePointer)
        self._streams = {peer: cuda.Stream(non_blocking=True) for peer in self._peers}
        self._fork = self._event()
        self._joins = {peer: self._event() for peer in self._peers}
        handle: bytes = runtime.ipcGetMemHandle(self._outbox)
        return handle

    def _event(self) -> Any:
        return self._cuda.Event(disable_timing=True)

    def _open(self, handles: Sequence[bytes]) -> bytes:
        for peer in self._peers:
            self._outboxes[peer] = self._runtime.ipcOpenMemHandle(handles[peer])
        return b""

    def _prepare_flags(self) -> None:
        def at(slot: int, src: int, dst: int) -> int:
            return self._flags + self._shared.offset(slot, src, dst)

        slots, peers, me = range(SLOTS), self._peers, self.rank
        self._until_empty = [waits([at(slot, me, peer) for peer in peers], EMPTY) for slot in slots]
        self._set_full = {(slot, peer): at(slot, me, peer) for slot in slots for peer in peers}
        self._until_full = {(slot, peer): waits([at(slot, peer, me)], FULL) for slot in slots for peer in peers}
        self._set_empty = {(slot, peer): writes([at(slot, peer, me)], EMPTY) for slot in slots for peer in peers}
        self._filled: dict[tuple[int, tuple[int, ...]], Operations] = {}

    # --- carrying messages

    def prepare(self, launches: Sequence[Launch]) -> tuple[Launch, ...]:
        """The launches as `launch` wants them, all or a part. Collective, in the same order on all ranks; blocks."""
        self.check()
        outgoing = Outgoing(self._slot_bytes)
        for launch in launches:
            outgoing.add(launch)
        try:
            told = self._shared.exchange(outgoing.told(), self._timeout, "planning copies between GPUs")
            return planned(launches, self.rank, outgoing, told)
        except CollectiveError as error:  # who has and who has not planned is not known any more
            self.abort(str(error))
            raise

    def launch(
        self,
        launches: Sequence[Launch],
        address: Callable[[Place], int],
        act: Callable[[Action], None],
        strands: Strands,
    ) -> None:
        """Give all launches, which `prepare` made, to a stream, and wait for none of them.

        address: where a place is on the device. act: gives an action to the same stream. strands: this one alone.
        """
        self.check()
        (stream,) = strands.handles
        self._launch(launches, address, act, stream)

    def _launch(
        self,
        launches: Sequence[Launch],
        address: Callable[[Place], int],
        act: Callable[[Action], None],
        stream: int,
    ) -> None:
        for launch in launches:
            assert isinstance(launch, PlannedLaunch), "launches must come from `prepare`"
            for action in launch.actions:
                act(action)
            if launch.rounds or launch.fetches:
                self._exchange(launch, address, stream)

    def greet(self, messages: Sequence[tuple[bool, int, int, int]], stream: int) -> None:
        """First messages over every edge, on all ranks: (is it a send, peer, address, bytes) each."""
        nodes = (Node(0, peer, 0, send, Place("", at, nbytes)) for send, peer, at, nbytes in messages)
        prepared = self.prepare((Launch(0, (), tuple(nodes)),))
        self._launch(prepared, lambda place: place.offset, lambda action: None, stream)

    def _exchange(self, launch: PlannedLaunch, address: Callable[[Place], int], stream: int) -> None:
        """One launch. The order in which streams are given the rounds is part of the proof that none waits for ever."""
        runtime = self._runtime
        sources = dict.fromkeys(fetch.peer for fetches in launch.fetches for fetch in fetches)
        if sources:
            runtime.eventRecord(self._fork.ptr, stream)
            for peer in sources:
                runtime.streamWaitEvent(self._streams[peer].ptr, self._fork.ptr)
        for number in range(max(len(launch.rounds), len(launch.fetches))):
            if number < len(launch.rounds):
                self._lay(launch.rounds[number], address, stream)
            if number < len(launch.fetches):
                for fetch in launch.fetches[number]:
                    self._fetch(fetch, address)
        for peer in sources:
            runtime.eventRecord(self._joins[peer].ptr, self._streams[peer].ptr)
            runtime.streamWaitEvent(stream, self._joins[peer].ptr)

    def _lay(self, laid: Round, address: Callable[[Place], int], stream: int) -> None:
        """Copy into a slot that no peer reads any more, and say so."""
        self._driver.run(self._until_empty[laid.slot], stream)
        copy, kind = self._runtime.memcpyAsync, self._runtime.memcpyDefault
        for place, offset in laid.copies:
            copy(self._outbox + offset, address(place), place.nbytes, kind, stream)
        key = laid.slot, laid.peers
        filled = self._filled.get(key)
        if filled is None:
            filled = self._filled[key] = writes([self._set_full[laid.slot, peer] for peer in laid.peers], FULL)
        self._driver.run(filled, stream)

    def _fetch(self, fetch: Fetch, address: Callable[[Place], int]) -> None:
        """Copy from a peer's slot once it is there, and give the slot back."""
        key, stream = (fetch.slot, fetch.peer), self._streams[fetch.peer].ptr
        self._driver.run(self._until_full[key], stream)
        copy, kind, outbox = self._runtime.memcpyAsync, self._runtime.memcpyDefault, self._outboxes[fetch.peer]
        for place, offset in fetch.copies:
            copy(address(place), outbox + offset, place.nbytes, kind, stream)
        self._driver.run(self._set_empty[key], stream)

    # --- errors and ends

    def check(self) -> None:
        """Raise what has gone wrong since: a peer that ended, or gave up."""
        if self.broken is None:
            trouble = self._shared.trouble()
            if trouble is not None:
                self.abort(f"arrays travel by CUDA IPC, and {trouble}")
        if self.broken is not None:
            raise CollectiveError(self.broken)

    def abort(self, why: str) -> None:
        """Let everything under way on the device run through, so that nothing waits for peers that are gone."""
        if self.broken is None:
            self.broken = why
            self._shared.tell(GAVE_UP)
            threading.Thread(target=self._free_streams, name="tasp_coll IPC links given up", daemon=True).start()

    def _free_streams(self) -> None:
        """For ever, as streams that go on set flags too; ever more slowly, so that it costs next to nothing."""
        flags, nap = self._shared.flags, _NAP_SECONDS
        while True:
            flags[:, self.rank, :] = flags[:, :, self.rank] = EMPTY | FULL
            time.sleep(nap)
            nap = min(nap * 1.001, _LONGEST_NAP_SECONDS)

    def close(self) -> None:
        """Give the outboxes back, when the device has finished with them. After `abort` all stays as it is.

        What a peer may still read is not given back before the process ends.
        """
        if self.broken is not None:
            return
        self.broken = "these links are closed"
        taken = self._eventually(lambda: bool((self._mine() == EMPTY).all()), _TAKEN_SECONDS)
        for outbox in self._outboxes.values():
            self._runtime.ipcCloseMemHandle(outbox)
        self._shared.tell(CLOSED)
        if taken and self._eventually(lambda: ALIVE not in self._shared.states(), _CLOSED_SECONDS):
            self._runtime.free(self._outbox)
        self._runtime.hostUnregister(self._shared.address)
        self._shared.close()

    def _mine(self) -> np.ndarray[Any, Any]:
        """Flags of what this rank laid down."""
        found: np.ndarray[Any, Any] = self._shared.flags[:, self.rank, self._peers]
        return found

    def _eventually(self, true: Callable[[], bool], seconds: float) -> bool:
        """Wait for it, as long as all peers live."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline or self._shared.trouble() is not None:
                return False
            time.sleep(_NAP_SECONDS)
        return True
