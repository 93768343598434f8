"""Stream memory operations: a stream that waits for a bit in memory, or writes a word, with no kernel and no host.

They are what lets streams of different processes wait for each other: a CUDA event that another process has not
recorded yet counts as done, a word in memory that it has not written yet does not. CuPy does not have them, so they
are called in the driver itself, by ctypes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tasp_coll.errors import CollectiveError

_WAIT_VALUE_32, _WRITE_VALUE_32 = 1, 2
_UNTIL_ANY_BIT = 2  # CU_STREAM_WAIT_VALUE_AND
_WORDS = 6  # of 8 bytes, in a CUstreamBatchMemOpParams: operation, address, value, flags, two for the driver
_MOST = 255


class Operations(NamedTuple):
    """Prepared operations, run in this order. `memory` holds them as the driver reads them, at `address`."""

    address: int
    size: int
    memory: np.ndarray[Any, Any]


def waits(addresses: Iterable[int], bit: int) -> Operations:
    """Wait until the 32-bit word at each address has the bit."""
    return _operations(addresses, _WAIT_VALUE_32, bit, _UNTIL_ANY_BIT)


def writes(addresses: Iterable[int], value: int) -> Operations:
    """Write a 32-bit word at each address, after all that the stream did before is visible to the whole machine."""
    return _operations(addresses, _WRITE_VALUE_32, value, 0)


def _operations(addresses: Iterable[int], kind: int, value: int, flags: int) -> Operations:
    memory = np.array([(kind, address, value, flags, 0, 0) for address in addresses], np.uint64).reshape(-1, _WORDS)
    return Operations(int(memory.ctypes.data), len(memory), memory)


class StreamMemory:
    """The driver's call."""

    def __init__(self, library: Any) -> None:
        self._call = library.cuStreamBatchMemOp_v2
        self._call.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
        self._call.restype = ctypes.c_int

    def run(self, operations: Operations, stream: int) -> None:
        """Give operations to a stream of the thread's current device. CollectiveError: the driver refuses them."""
        for first in range(0, operations.size, _MOST):
            count = min(_MOST, operations.size - first)
            code = self._call(stream, count, operations.address + 8 * _WORDS * first, 0)
            if code:
                raise CollectiveError(
                    f"the CUDA driver refuses stream memory operations (cuStreamBatchMemOp_v2: error {code}), by which "
                    "ranks wait for each other where arrays travel by CUDA IPC"
                )


def load() -> StreamMemory:
    """Of the driver that is installed. CollectiveError says what is missing."""
    try:
        return StreamMemory(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError) as error:
        raise CollectiveError(f"CUDA IPC needs an NVIDIA driver of CUDA 11.7 or newer ({error})") from error
