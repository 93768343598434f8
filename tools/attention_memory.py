"""How much memory a call takes at its worst moment, as Linux saw it, or torch on a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = -3  # of mallopt
_SMALL = 64 << 10


def peak_bytes(call: Callable[[], object]) -> int | None:
    """What the process, or torch's memory on its GPU, grew by at most during the call, its result included; None where
    that cannot be known.

    From now on the C library gives memory back as soon as it is freed, so measure times before.
    """
    import torch

    if torch.cuda.is_initialized():  # the tensors are there
        torch.cuda.reset_peak_memory_stats()
        used = torch.cuda.memory_allocated()
        held = call()
        grown = torch.cuda.max_memory_allocated() - used
        del held
        return grown
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _SMALL)
        gc.collect()
        library.malloc_trim(0)
        _RESET.write_text("5")
        before = _field("VmRSS")
        kept = call()
        grown = _field("VmHWM") - before
    except (OSError, AttributeError):  # another system, another C library, or no right to look
        return None
    del kept
    return max(grown, 0)


def _field(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1]) << 10
