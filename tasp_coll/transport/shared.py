"""Memory that the ranks of one host share: flags for their streams, the state of each rank, and letters.

It is a file of /dev/shm that all have opened and that then has no name any more, so that nothing is left of it
whatever happens to the ranks.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import tempfile
import threading
import time
import zlib
from typing import Any

import numpy as np

from tasp_coll.errors import CollectiveError, PeerTimeoutError

DIRECTORY = "/dev/shm"
ALIVE, GAVE_UP, CLOSED = 0, 1, 2
_LINE = 64  # bytes between flags: each on a cache line of its own
_LETTER_BYTES = 1 << 22  # at most; memory is taken for what is written only
_HEADER = 3  # words before a letter: its number, its length, its checksum
_NAP_SECONDS = 5e-5


def machine() -> str:
    """The same for ranks that share /dev/shm and see each other's processes, and for no others."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as told:
            boot = told.read().strip()
        return f"{os.uname().nodename} {boot} {os.stat(DIRECTORY).st_dev} {os.readlink('/proc/self/ns/pid')}"
    except OSError as error:
        return f"{os.uname().nodename}, process {os.getpid()} ({error})"


def nameless(total: int) -> tuple[int, str]:
    """So many bytes of memory, zeros: a descriptor, and by which path others open it while this one is open.

    It has no name that could be left behind, and all of it is there from the start: where there is none, OSError says
    so now, and no signal later.
    """
    descriptor = os.memfd_create("tasp_coll")
    try:
        os.posix_fallocate(descriptor, 0, total)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


def opened(path: str, total: int) -> np.ndarray[Any, Any]:
    """That memory, as bytes; it goes when nothing refers to it."""
    with open(path, "r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), total), np.uint8)


class Shared:
    """One rank's view of the memory. `flags`: (slots, ranks, ranks) words, each alone on its cache line."""

    def __init__(self, path: str, rank: int, size: int, slots: int) -> None:
        """path: of `create`, called by one of the ranks with the same size and slots."""
        self.rank, self.size = rank, size
        flags, states, total = _extents(size, slots)
        self.flag_bytes, self._slots = flags, slots
        whole = opened(path, total)
        self.address = int(whole.ctypes.data)
        self.flags = whole[: slots * size * size * _LINE].view(np.uint32).reshape(slots, size, size, -1)[..., 0]
        self._states = whole[flags : flags + 4 * size].view(np.uint32)
        letters = whole[flags + states :].reshape(2, size, -1)
        self._heads = letters[..., : 8 * _HEADER].view(np.uint64)
        self._bodies = letters[..., 8 * _HEADER :]
        self._number = 0
        self._processes: dict[int, int] = {}  # descriptor of a process -> rank
        self._looking, self._poll = threading.Lock(), select.poll()

    @staticmethod
    def create(size: int, slots: int, value: int) -> str:
        """The path of such memory for `size` ranks, all flags `value`. To be removed when all have opened it."""
        flags, _, total = _extents(size, slots)
        try:
            descriptor, path = tempfile.mkstemp(prefix="tasp_coll-", dir=DIRECTORY)
        except OSError as error:
            raise CollectiveError(
                f"ranks of one host meet in {DIRECTORY}, which cannot be written ({error})"
            ) from error
        with open(descriptor, "r+b") as file:
            file.truncate(total)
            file.write(np.full(flags // 4, value, np.uint32).tobytes())
        return path

    def offset(self, slot: int, src: int, dst: int) -> int:
        """Bytes from `address` to a flag."""
        return ((slot * self.size + src) * self.size + dst) * _LINE

    # --- the state of ranks

    def tell(self, state: int) -> None:
        """This rank's state, for all to see."""
        self._states[self.rank] = state

    def states(self) -> list[int]:
        """Of all ranks."""
        return [int(state) for state in self._states]

    def watch(self, processes: list[int]) -> None:
        """Notice from now on when a rank's process ends. processes: by rank."""
        for rank, process in enumerate(processes):
            with contextlib.suppress(OSError, AttributeError):  # an old kernel: then the timeout has to do
                if process != os.getpid():
                    self._processes[descriptor := os.pidfd_open(process)] = rank
                    self._poll.register(descriptor, select.POLLIN)

    def trouble(self) -> str | None:
        """What has happened to another rank."""
        if self._states.any():
            for rank, state in enumerate(self.states()):
                if state == GAVE_UP and rank != self.rank:
                    return f"rank {rank} gave up"
        if not self._processes or not self._looking.acquire(blocking=False):  # or another thread looks just now
            return None
        try:
            ended = [self._processes[descriptor] for descriptor, _ in self._poll.poll(0)]
        finally:
            self._looking.release()
        gone = sorted(rank for rank in ended if self._states[rank] != CLOSED)
        return f"the process of rank {gone[0]} has ended" if gone else None

    # --- letters

    def exchange(self, text: bytes, timeout: float, why: str) -> list[bytes]:
        """Every rank's text, on every rank. All must call it, in the same order.

        PeerTimeoutError names those who have not written, `why` what for; CollectiveError: one is gone, or wrote too
        much.
        """
        self._number += 1
        board = self._number % 2  # whoever writes has read all earlier letters, so no one reads the last but one
        too_long = len(text) > self._bodies.shape[-1]
        body = b"" if too_long else text
        self._bodies[board, self.rank, : len(body)] = np.frombuffer(body, np.uint8)
        length = len(text)
        self._heads[board, self.rank] = self._number, length, self._sum(length, body)
        found = {self.rank: text}
        deadline = time.monotonic() + timeout
        while len(found) < self.size:
            for rank in set(range(self.size)) - set(found):
                letter = self._read(board, rank)
                if letter is not None:
                    found[rank] = letter
            if len(found) < self.size:
                self._wait(deadline, sorted(set(range(self.size)) - set(found)), timeout, why)
        if too_long or any(len(letter) > self._bodies.shape[-1] for letter in found.values()):
            raise CollectiveError(f"{why}: a rank has more to tell than {self._bodies.shape[-1]} bytes")
        return [found[rank] for rank in range(self.size)]

    def _read(self, board: int, rank: int) -> bytes | None:
        """The letter of this number, when all of it is there."""
        number, length, told = (int(word) for word in self._heads[board, rank])
        if number != self._number:
            return None
        if length > self._bodies.shape[-1]:
            return bytes(self._bodies.shape[-1] + 1)
        body = self._bodies[board, rank, :length].tobytes()
        return body if told == self._sum(length, body) else None

    def _sum(self, length: int, body: bytes) -> int:
        """Says that number, length and body belong together: processors may write them in any order."""
        return zlib.crc32(body, zlib.crc32(f"{self._number} {length}".encode()))

    def _wait(self, deadline: float, missing: list[int], timeout: float, why: str) -> None:
        trouble = self.trouble()
        if trouble is not None:
            raise CollectiveError(f"{why}: {trouble}")
        if time.monotonic() > deadline:
            who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            raise PeerTimeoutError(f"{why}: no answer from {who} within {timeout:.3g} s", peers=missing, call=why)
        time.sleep(_NAP_SECONDS)

    def close(self) -> None:
        """No longer watch processes. The memory goes when nothing refers to it."""
        with self._looking:
            for descriptor in self._processes:
                self._poll.unregister(descriptor)
                os.close(descriptor)
            self._processes.clear()


def _extents(size: int, slots: int) -> tuple[int, int, int]:
    """Bytes of the flags and of the states, in whole pages, and of everything."""
    page = mmap.PAGESIZE
    flags = -(-slots * size * size * _LINE // page) * page
    states = -(-4 * size // page) * page
    return flags, states, flags + states + 2 * size * _LETTER_BYTES
