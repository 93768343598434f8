"""Reading other processes' memory, and a direct exchange by reads, here of one process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest

from tasp_coll import CollectiveError, reading
from tasp_coll.reading import Reading, fetches
from tasp_coll.transport.peer_memory import PeerMemory, Proof


def forbidden() -> str:
    """Why this process cannot read even its own memory so; empty if it can."""
    proof, held = Proof.laid()
    try:
        PeerMemory([os.getpid()]).read(0, proof.address, ctypes.addressof(held), len(proof.content))
    except (OSError, CollectiveError) as error:
        return str(error)
    return ""


FORBIDDEN = forbidden()
pytestmark = pytest.mark.skipif(bool(FORBIDDEN), reason=FORBIDDEN)


@pytest.fixture
def ended() -> int:
    """A process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_reads(ended: int) -> None:
    memory = PeerMemory([os.getpid(), ended])
    there, here = np.arange(1000), np.zeros(1000, np.int64)
    assert memory.read(0, there.ctypes.data + 80, here.ctypes.data, 720) == 720
    assert here.tolist() == [*range(10, 100), *[0] * 910]
    assert memory.read(1, there.ctypes.data, here.ctypes.data, 8) == 0
    with pytest.raises(CollectiveError, match="cannot read 16 bytes of rank 0's memory: Bad address"):
        memory.read(0, 8, here.ctypes.data, 16)


def test_whether_it_works(ended: int) -> None:
    proof, held = Proof.laid()
    assert PeerMemory([os.getpid()] * 2).works([proof, proof])
    assert held.raw == proof.content
    other = proof._replace(content=bytes(16))
    assert not PeerMemory([os.getpid()] * 2).works([proof, other])
    assert not PeerMemory([os.getpid(), ended]).works([proof, proof])
    assert not PeerMemory([os.getpid()]).works([proof._replace(address=8)])


def test_a_system_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    with pytest.raises(OSError, match="no process_vm_readv"):
        PeerMemory([1])


@pytest.mark.parametrize("ranks", range(1, 10))
def test_a_rank_fetches_each_shard_once(ranks: int) -> None:
    """But for its own, and those of no bytes; at any time all read from different ranks."""
    sizes = [1000 * rank % 7777 for rank in range(ranks)]
    starts = np.cumsum([0, *sizes])
    for rank in range(ranks):
        wanted = fetches(rank, sizes)
        assert sorted(wanted) == [(i, starts[i], sizes[i]) for i in range(ranks) if i != rank and sizes[i]]
    turns = zip(*(fetches(rank, [1] * ranks) for rank in range(ranks)), strict=True)
    assert all(len({fetch.peer for fetch in turn}) == ranks for turn in turns)


def test_large_shards_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is still waited for is told between them."""
    monkeypatch.setattr(reading, "PIECE", 1000)
    rng = np.random.default_rng(1)
    sizes = [2500, 1000, 1]
    shards = [np.frombuffer(rng.bytes(size), np.uint8) for size in sizes]
    out = np.zeros(3501, np.uint8)
    memory, sources = PeerMemory([os.getpid()] * 3), [shard.ctypes.data for shard in shards]
    run = Reading(memory, fetches(1, sizes), sources, out.ctypes.data)
    waited = []
    while not run.done:
        waited.append(run.pending())
        assert run.poll()
    assert waited == [({0}, None)] * 3 + [({2}, None)]
    assert run.pending() == (set(), None)
    assert out[:2500].tobytes() == shards[0].tobytes()
    assert out[3500] == shards[2][0]
    assert not out[2500:3500].any()


def test_a_peer_that_has_ended_is_waited_for(ended: int) -> None:
    """Until the timeout, which then names it."""
    out, wanted = np.zeros(2, np.int64), fetches(0, [8, 8])
    gone = PeerMemory([os.getpid(), ended])
    run = Reading(gone, wanted, [8, 8], out.ctypes.data)
    assert not run.poll()
    assert not run.done
    assert run.pending() == ({1}, None)
