"""Memory of other processes of this host, read without their doing: Linux's `process_vm_readv`.

A message between two processes is such a copy too, once they have told each other where from and where to. Where the
round that begins a call has told all of them at once, nothing of that is left to do. Systems may forbid it (Yama's
`ptrace_scope`, seccomp): `works` says what holds between these ranks.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from tasp_coll.errors import CollectiveError

_PROOF_BYTES = 16


class Proof(NamedTuple):
    """Where a process has something that none could guess, and what."""

    process: int
    address: int
    content: bytes

    @classmethod
    def laid(cls) -> tuple[Proof, Any]:
        """This process's, and what keeps it in its place."""
        held = ctypes.create_string_buffer(secrets.token_bytes(_PROOF_BYTES), _PROOF_BYTES)
        return cls(os.getpid(), ctypes.addressof(held), held.raw), held


class PeerMemory:
    """What the ranks of one host can read of each other. processes: by rank; all in this one's PID namespace."""

    def __init__(self, processes: Sequence[int]) -> None:
        """Raises OSError where the C library has no such call."""
        try:
            self._read = ctypes.CDLL(None, use_errno=True).process_vm_readv
        except AttributeError as error:
            raise OSError(errno.ENOSYS, "no process_vm_readv") from error
        self._read.restype = ctypes.c_ssize_t
        self._read.argtypes = [ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong]
        self._processes = tuple(processes)
        self._places = (ctypes.c_size_t * 4)()  # to where and how much, from where and how much
        self._here = ctypes.addressof(self._places)
        self._there = self._here + 2 * ctypes.sizeof(ctypes.c_size_t)

    def read(self, rank: int, source: int, target: int, nbytes: int) -> int:
        """Copy from that rank's address `source`; how many bytes came, 0 if its process has ended.

        CollectiveError: they cannot be read.
        """
        places = self._places
        places[0] = target
        places[2] = source
        places[1] = places[3] = nbytes
        came = int(self._read(self._processes[rank], self._here, 1, self._there, 1, 0))
        if came < 0:
            number = ctypes.get_errno()
            if number != errno.ESRCH:
                raise CollectiveError(f"cannot read {nbytes} bytes of rank {rank}'s memory: {os.strerror(number)}")
        return max(came, 0)

    def works(self, proofs: Sequence[Proof]) -> bool:
        """Whether this rank can read what each of them has there. proofs: by rank."""
        seen = ctypes.create_string_buffer(_PROOF_BYTES)
        try:
            for rank, proof in enumerate(proofs):
                if self.read(rank, proof.address, ctypes.addressof(seen), _PROOF_BYTES) != _PROOF_BYTES:
                    return False
                if seen.raw[:_PROOF_BYTES] != proof.content:
                    return False
        except CollectiveError:
            return False
        return True
