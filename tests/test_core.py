"""Staging memory: as large as asked for, given back whole, and an error where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tasp_coll.core import Arena

_MANY = 1 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_it_grows_and_never_shrinks():
    arena = Arena()
    for nbytes in (1, 100, 99, 1 << 16, 5 << 20, 7):
        address = arena.address(nbytes)
        assert address == arena.memory.ctypes.data
        arena.memory[:] = 255
    assert len(arena.memory) == 5 << 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells by /proc what is resident")
def test_what_is_dropped_goes_back_to_the_system():
    arenas, between = [Arena() for _ in range(64)], []
    before = _resident()
    for arena in arenas:
        arena.address(_MANY)
        arena.memory[:] = 1
        between.append(np.ones(100))  # small things between would keep the allocator's memory here
    assert _resident() - before >= 60 * _MANY
    held = Arena.all_bytes()
    del arena, arenas
    assert _resident() - before < 8 * _MANY
    assert held - Arena.all_bytes() == 64 * _MANY


def test_memory_that_is_not_there():
    arena = Arena()
    with pytest.raises(MemoryError, match="bytes of staging"):
        arena.address(1 << 60)
    assert arena.address(1 << 17)
    assert len(arena.memory) == 1 << 17
