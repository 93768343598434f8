"""TASP_COLL_CHECKSUM=1: a flipped bit is found, its link and step named on every rank, and all else is as before."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from loopback_ranks import attempt, on_ranks
from tasp_coll import ArgumentError, Communicator, CorruptionError, MismatchError, checksums
from tasp_coll.core import SLOTS
from tasp_coll.transport import Op
from tasp_coll.transport.loopback import LoopbackTransport, LoopbackWorld

N, ROWS = 4, 300
Call = Callable[[Communicator], Any]


@pytest.fixture(autouse=True)
def with_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASP_COLL_CHECKSUM", "1")


class FlippingTransport(LoopbackTransport):
    """Flips a bit of the `when`-th message of data that comes on the link from rank `source` to rank `target`."""

    source = target = when = -1
    spoils = False  # what this rank has received, just before it hands it on

    def duplicate(self) -> FlippingTransport:
        return self

    def prepare(self, ops: Sequence[Op]) -> Any:
        batch: Any = super().prepare(ops)
        receive, start = batch.test_some, batch.start

        def started(indices: Sequence[int]) -> None:
            taken = {op.address for op in ops if not op.send}
            for op in (ops[index] for index in indices):
                if self.spoils and op.send and op.lane >= SLOTS and op.address in taken and op.nbytes > 100:
                    ctypes.c_ubyte.from_address(op.address).value ^= 1
            start(indices)

        def received() -> list[int]:
            done: list[int] = receive()
            for op in (ops[index] for index in done):
                if not op.send and op.lane >= SLOTS and (op.peer, self.rank) == (self.source, self.target):
                    if self.when == 0:
                        ctypes.c_ubyte.from_address(op.address + op.nbytes // 2).value ^= 4
                    self.when -= 1
            return done

        batch.start, batch.test_some = started, received
        return batch


def flipping(n: int, link: tuple[int, int], body: Callable[[Communicator, FlippingTransport], Any]) -> list[Any]:
    """body(communicator, its transport) on n ranks whose link may flip bits: `when` says in which message."""
    world = LoopbackWorld(n)
    world.transports = tuple(FlippingTransport(world, rank) for rank in range(n))

    def one(transport: Any) -> Any:
        transport.source, transport.target = link
        with Communicator(transport, timeout=20) as comm:
            return body(comm, transport)

    return world.run(one)


def gathered(comm: Communicator, name: str, **options: Any) -> None:
    got = getattr(comm, name)(np.full(ROWS, comm.rank), **options)
    assert (got == np.repeat(np.arange(comm.size), ROWS)).all()


def summed(comm: Communicator, **options: Any) -> None:
    got = comm.decomposed_allreduce(np.full(ROWS, comm.rank, np.float16), **options)
    assert (got == sum(range(comm.size))).all()


def scattered(comm: Communicator, **options: Any) -> None:
    got = comm.decomposed_reduce_scatter(np.full((comm.size, ROWS), comm.rank), **options)
    assert (got == sum(range(comm.size))).all()


def exchanged(comm: Communicator) -> None:
    got = comm.all_to_all(np.full((comm.size, ROWS), comm.rank))
    assert (got == np.arange(comm.size)[:, None]).all()


COLLECTIVES: dict[str, Call] = {
    **{
        f"{name} {algorithm}": lambda comm, n=name, a=algorithm: gathered(comm, f"decomposed_{n}", algorithm=a)
        for name in ("allgather", "allgatherv")
        for algorithm in ("rings", "ring", "direct", "auto", "hierarchical")
    },
    **{
        f"{call.__name__} {algorithm}": lambda comm, c=call, a=algorithm: c(comm, algorithm=a)
        for call in (summed, scattered)
        for algorithm in ("rings", "ring", "direct", "auto", "hierarchical")
    },
    "all_to_all": exchanged,
    "async": lambda comm: comm.decomposed_allreduce(np.ones(ROWS), async_op=True).wait(),
}


def walked(comm: Communicator, **options: Any) -> None:
    for arrival in comm.allgather_steps(np.full((ROWS, 2), comm.rank), **options):
        assert all((chunk.data == chunk.source).all() for chunk in arrival.chunks)


def collected(comm: Communicator, accumulate: bool) -> None:
    sums = np.empty((ROWS, 2))
    for request in comm.reduce_scatter_steps(sums, algorithm="rings", accumulate=accumulate):
        for chunk in request.chunks:
            chunk.data[...] = comm.rank + (chunk.data if accumulate else 0)
    assert (sums == sum(range(comm.size))).all()


STREAMS: dict[str, Call] = {
    **{name: lambda comm, a=name: walked(comm, algorithm=a) for name in ("rings", "direct", "hierarchical")},
    "reverse": lambda comm: walked(comm, reverse=True),
    "donate": lambda comm: walked(comm, donate=True),
    "sums": lambda comm: collected(comm, False),
    "accumulate": lambda comm: collected(comm, True),
}


def topology(name: str, n: int) -> str:
    return f"cluster:{n // 2}x2" if "hierarchical" in name else f"full_mesh:{n}"


@pytest.mark.parametrize("name", [*COLLECTIVES, *STREAMS])
def test_results_are_as_without(name: str) -> None:
    call = {**COLLECTIVES, **STREAMS}[name]
    on_ranks(N, lambda comm: [call(comm) for _ in range(3)], topology=topology(name, N))
    if "hierarchical" not in name:
        for n in (1, 2, 3):
            on_ranks(n, call)


@pytest.mark.parametrize("name", list(COLLECTIVES))
def test_a_flipped_bit_is_named_on_all_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the data or of the seal behind it; the communicator goes on."""
    monkeypatch.setenv("TASP_COLL_TOPOLOGY", topology(name, N))
    call = COLLECTIVES[name]

    def body(comm: Communicator, transport: FlippingTransport) -> list[BaseException | None]:
        call(comm)
        found = []
        for when in range(2):
            transport.when = when
            found.append(attempt(lambda: call(comm)))
            transport.when = -1
            call(comm)
        return found

    link = (3, 2) if name in ("scattered ring", "scattered auto") else (2, 3)  # one ring uses half of the links
    for faults in zip(*flipping(N, link, body), strict=True):
        assert all(isinstance(fault, CorruptionError) for fault in faults), faults
        assert len(set(map(str, faults))) == 1
        first: Any = faults[0]
        assert first.link == link
        assert f"on ring {first.ring}, from rank {link[0]} to rank {link[1]}, at step {first.step}" in str(first)


@pytest.mark.parametrize("name", list(STREAMS))
def test_a_flipped_bit_in_a_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets what was spoilt, or something that is made of it, is told before; the communicator goes on."""
    monkeypatch.setenv("TASP_COLL_TOPOLOGY", topology(name, N))
    call = STREAMS[name]

    def body(comm: Communicator, transport: FlippingTransport) -> BaseException | None:
        call(comm)
        transport.when = 0
        error = attempt(lambda: call(comm))
        transport.when = -1
        call(comm)
        return error

    errors = [error for error in flipping(N, (2, 3), body) if error is not None]
    assert errors
    for error in errors:
        assert isinstance(error, CorruptionError), error
        assert error.link == (2, 3)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_rank_that_spoils_what_it_hands_on_is_found(streamed: bool) -> None:
    """End to end: the link behind it is named, though every link carries its bytes as they are."""

    def body(comm: Communicator, transport: FlippingTransport) -> BaseException | None:
        def call() -> None:
            if streamed:
                walked(comm, algorithm="ring")
            else:
                gathered(comm, "decomposed_allgather", algorithm="ring")

        transport.spoils = comm.rank == 1
        return attempt(call)

    errors = flipping(3, (-1, -1), body)
    assert errors[2] is not None
    for rank, error in enumerate(errors):
        if error is not None and not (streamed and rank == 1):  # which sees what it has done itself
            assert isinstance(error, CorruptionError)
            assert error.link[0] == 1
            assert error.step == 1, "at step 0 it sends its own"


@pytest.mark.parametrize("value, says", [("yes", "must be 0 or 1, got 'yes'"), ("2", "got '2'")])
def test_values_that_cannot_be_meant(value: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASP_COLL_CHECKSUM", value)
    with pytest.raises(ArgumentError, match=says):
        on_ranks(2, lambda comm: None)


def test_all_ranks_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here, with one environment: what they read is told apart by hand."""
    me = threading.local()
    monkeypatch.setattr(checksums, "wanted", lambda: me.odd)

    def one(transport: LoopbackTransport) -> BaseException | None:
        me.odd = transport.rank == 1
        return attempt(lambda: Communicator(transport, timeout=20))

    for error in LoopbackWorld(3).run(one):
        assert isinstance(error, MismatchError)
        assert "rank 1 passed TASP_COLL_CHECKSUM 1; ranks 0, 2 passed TASP_COLL_CHECKSUM 0" in str(error)


def test_what_cannot_be_checked_is_refused() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ArgumentError, match="'native' cannot be checked"):
            comm.decomposed_allgather(np.zeros(4), algorithm="native")
        gathered(comm, "decomposed_allgather")

    on_ranks(2, body)
