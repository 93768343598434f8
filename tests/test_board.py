"""Rounds on a board: the memory that ranks of one host share, here of one process."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

import tasp_coll
from tasp_coll import board
from tasp_coll.agreement import Header
from tasp_coll.board import Board, board_bytes
from tasp_coll.transport.loopback import LoopbackTransport, LoopbackWorld
from tasp_coll.transport.shared import nameless, opened


def boards(size: int) -> list[Board]:
    """One for each rank."""
    world = LoopbackWorld(size)
    transports = [LoopbackTransport(world, rank) for rank in range(size)]
    memory = np.zeros(board_bytes(size), np.uint8)
    return [Board(transport, memory) for transport in transports]


def header(number: int, payload: bytes = b"") -> Header:
    return Header(f"call {number}".encode().ljust(16), len(payload), number)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_what_all_wrote_is_there(size: int) -> None:
    """Payloads of any length, also shorter ones after longer ones."""
    ranks, rng = boards(size), np.random.default_rng(size)
    for number in range(50):
        said = [rng.bytes(int(rng.integers(ranks[0].capacity + 1))) for _ in ranks]
        for rank, each in enumerate(ranks):
            each.post(header(number, said[rank]).packed(), said[rank])
            assert each.poll() == (rank == size - 1)
        for each in ranks:
            assert each.poll()
            assert each.same(header(number).signature)
            assert each.headers() == [header(number, text) for text in said]
            for rank, text in enumerate(said):
                assert each.payloads(len(text))[rank].tobytes() == text
                assert each.payload(rank) == each.payloads(1)[rank].ctypes.data


def test_what_a_slow_rank_reads_stays_while_others_go_on() -> None:
    """Rank 0 is in the next round while rank 1 still reads this one's; it cannot be in the one after."""
    first, second = boards(2)
    for number in range(6):
        first.post(header(number, b"ab").packed(), b"ab")
        second.post(header(number, b"cd").packed(), b"cd")
        assert first.poll()
        first.post(header(100 + number, b"xy").packed(), b"xy")
        assert not first.poll()
        assert second.poll()
        assert second.header(0) == header(number, b"ab")
        assert second.payloads(2).tobytes() == b"abcd"
        second.post(header(100 + number, b"uv").packed(), b"uv")
        assert second.poll()
        assert first.poll()
        assert first.payloads(2).tobytes() == second.payloads(2).tobytes() == b"xyuv"


def test_it_says_who_is_waited_for_and_who_differs() -> None:
    ranks = boards(4)
    ranks[2].post(header(1).packed())
    ranks[0].post(header(1).packed())
    assert ranks[0].pending() == {1, 3}
    assert ranks[2].pending() == {1, 3}
    ranks[1].post(header(2).packed())
    ranks[3].post(header(1).packed())
    assert ranks[0].pending() == set()
    assert ranks[0].poll()
    assert not ranks[0].same(header(1).signature)


def test_what_one_has_left_is_never_complete() -> None:
    """Though it took part: what it said there need not hold any more. What was complete before stays so."""
    first, second = boards(2)
    for number in range(3):
        for each in (first, second):
            each.post(header(number).packed())
        assert second.poll()
    second.leave()
    assert first.poll()
    second.post(header(4).packed())
    second.leave()
    first.post(header(4).packed())
    assert not first.poll()
    assert first.pending() == {1}


def test_whoever_waits_lets_the_library_move_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers may need that to get to their round."""
    first, _ = boards(2)
    looks: list[None] = []
    monkeypatch.setattr(first._transport, "alarms", lambda: looks.append(None))
    first.post(header(1).packed())
    for _ in range(100):
        assert not first.poll()
    assert len(looks) >= 10


def test_whoever_never_waits_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = boards(2)
    looks: list[None] = []
    monkeypatch.setattr(second._transport, "alarms", lambda: looks.append(None))
    for number in range(100):
        for each in (first, second):
            each.post(header(number).packed())
        assert second.poll()
        assert first.poll()
    assert len(looks) >= 10


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:tasp_coll")


def test_memory_is_let_go() -> None:
    transport = LoopbackTransport(LoopbackWorld(1), 0)
    total, before = board_bytes(1), mapped()
    descriptor, path = nameless(total)
    held = Board(transport, opened(path, total))
    os.close(descriptor)
    held.post(header(1).packed(), b"abc")
    assert held.poll()
    assert held.payloads(3).tobytes() == b"abc"
    assert mapped() > before
    held.close()
    assert mapped() == before


def test_nothing_is_left_where_there_is_no_room() -> None:
    before, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            nameless(1 << 21)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_there_can_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(board.ENVIRONMENT, "0")
    assert not board.wanted()
    monkeypatch.delenv(board.ENVIRONMENT)
    assert board.wanted()
    monkeypatch.setattr(board.platform, "machine", lambda: "aarch64")
    assert board.place() == ""


def test_what_the_environment_cannot_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(board.ENVIRONMENT, "no")
    with pytest.raises(tasp_coll.ArgumentError, match="TASP_COLL_SHARED_MEMORY must be 0 or 1, got 'no'"):
        tasp_coll.Communicator(LoopbackTransport(LoopbackWorld(1), 0))
