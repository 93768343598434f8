"""Every call against every way in which one rank can pass something else: 2 to 5 ranks, at the first and at the
thousandth call. All ranks get the same error, which says who passed what, and go on; or, where what was passed fits
together, all get the right result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from loopback_ranks import attempt, on_ranks
from own_schedules import trees
from tasp_coll import CollectiveError, Communicator, MismatchError, PeerTimeoutError
from tasp_coll.transport.loopback import LoopbackTransport, LoopbackWorld

SIZES = (2, 3, 4, 5)
CALLS_BEFORE = 999


@dataclass(frozen=True)
class Passed:
    """What a rank calls, and with what."""

    call: str
    rows: int = 0  # beyond as many as there are ranks
    rest: tuple[int, ...] = (3,)
    dtype: str = "float32"
    options: tuple[tuple[str, Any], ...] = ()
    counts: str = ""
    schedule: bool = False
    async_op: bool = False
    in_place: bool = False

    def having(self, **options: Any) -> Passed:
        """With other options."""
        return replace(self, options=tuple(sorted({**dict(self.options), **options}.items())))

    def __call__(self, comm: Communicator) -> Any:
        n = comm.size
        shape = (n + self.rows, *self.rest)
        options = dict(self.options)
        if self.counts:
            options["counts"] = (n, *[0] * (n - 1)) if self.counts == "first" else (*[0] * (n - 1), n)
        if self.schedule:
            options["algorithm"] = trees(comm.topology, COLLECTIVES[self.call])
        if self.call.endswith("_steps"):
            return self._steps(comm, np.full(shape, 1, self.dtype), options)
        send, recv = self._arrays(comm, shape)
        if self.async_op:
            options["async_op"] = True
        found = getattr(comm, self.call)(send, recv, **options)
        return (found.wait() if self.async_op else found).sum(dtype="float64")

    def _arrays(self, comm: Communicator, shape: tuple[int, ...]) -> tuple[Any, Any]:
        if not self.in_place:
            return np.full(shape, 1, self.dtype), None
        if self.call.startswith("decomposed_allgather"):
            whole = np.full((comm.size * shape[0], *shape[1:]), 1, self.dtype)
            return whole[comm.rank * shape[0] : (comm.rank + 1) * shape[0]], whole
        send = np.full(shape, 1, self.dtype)
        part = shape[0] // comm.size
        return send, send if self.call.endswith("reduce") else send[comm.rank * part : (comm.rank + 1) * part]

    def _steps(self, comm: Communicator, array: Any, options: dict[str, Any]) -> float:
        if self.call == "allgather_steps":
            return float(
                sum(chunk.data.sum() for arrival in comm.allgather_steps(array, **options) for chunk in arrival.chunks)
            )
        for request in comm.reduce_scatter_steps(array, **options):
            for chunk in request.chunks:
                chunk.data[...] = 1 + (chunk.data if "accumulate" in options else 0)
        return float(array.sum())


COLLECTIVES = {
    "decomposed_allgather": "allgather",
    "decomposed_allgatherv": "allgather",
    "decomposed_reduce_scatter": "reduce_scatter",
    "decomposed_allreduce": "allreduce",
    "all_to_all": "",
    "allgather_steps": "",
    "reduce_scatter_steps": "",
}
USUAL = {name: Passed(name) for name in COLLECTIVES}


def elsewise(usual: Passed) -> Iterator[tuple[str, Passed, str]]:
    """What else a rank may pass: a name, the call, and what the error must say of it; nothing if it fits."""
    call, streamed = usual.call, usual.call.endswith("_steps")
    reducing = call in ("decomposed_reduce_scatter", "decomposed_allreduce")
    yield "shape", replace(usual, rest=(4,)), "4)"
    yield "dimensions", replace(usual, rest=(3, 1)), "3, 1)"
    yield "dtype", replace(usual, dtype="int32"), "dtype int32"
    if call not in ("decomposed_allgatherv", "allgather_steps", "reduce_scatter_steps"):
        rows = 5 * 4 * 3 if call in ("decomposed_reduce_scatter", "all_to_all") else 1  # which ranks must divide
        yield "rows", replace(usual, rows=rows), "shape ("
    if call != "all_to_all":
        yield "algorithm", usual.having(algorithm="ring"), "algorithm ring"
        yield "rings", usual.having(algorithm="rings", rings=1), "rings 1"
        yield "unknown algorithm", usual.having(algorithm="fast"), "got 'fast'"
    if COLLECTIVES[call]:
        yield "schedule", replace(usual, schedule=True), "algorithm schedule "
        yield "async", replace(usual, async_op=True), ""
        if call != "decomposed_allgatherv":
            yield "in place", replace(usual, in_place=True), ""
        yield "async, other shape", replace(usual, async_op=True, rest=(4,)), "4)"
    if reducing:
        yield "op", usual.having(op="max"), "op max"
        yield "unknown op", usual.having(op="xor"), "op must be one of"
    if call == "decomposed_reduce_scatter":
        yield "counts", replace(usual, counts="first"), "counts ("
        yield "bad counts", usual.having(counts=(1,)), "counts must be"
    if call == "allgather_steps":
        yield "reverse", usual.having(reverse=True), "reverse"
        yield "donate", usual.having(donate=True), ""
    if call == "reduce_scatter_steps":
        yield "accumulate", usual.having(accumulate=True), "accumulate"
    if not streamed:
        yield "no array", replace(usual, dtype="object"), "plain bytes"
    for other in COLLECTIVES:
        if other != call:
            yield f"call {other}", USUAL[other], f"call {other}"


CELLS = [(usual, *cell) for usual in USUAL.values() for cell in elsewise(usual)]


def right(comm: Communicator, call: Passed) -> float:
    """The sum of all elements that the usual arrays give."""
    n, row = comm.size, 3
    if call.call in ("decomposed_allgather", "decomposed_allgatherv", "allgather_steps"):
        return n * n * row
    return {"decomposed_reduce_scatter": n * row, "all_to_all": n * row}.get(call.call, n * n * row)


def cell_of(comm: Communicator, cell: tuple[Passed, str, Passed, str]) -> tuple[str, str]:
    """What the error says, if there is one, and what is wrong with it on this rank."""
    usual, _, odd_call, says = cell
    odd = comm.size - 1
    call = odd_call if comm.rank == odd else usual
    found: list[Any] = []
    error = attempt(lambda: found.append(call(comm)))
    again = attempt(lambda: usual(comm))  # all the same: it goes on
    if again is not None:
        return str(error), f"not usable afterwards: {again!r}"
    if not says:
        return str(error), "" if error is None and found == [right(comm, call)] else f"{error!r}, result {found}"
    if not isinstance(error, MismatchError):
        return str(error), f"not a MismatchError but {error!r}, result {found}"
    if odd not in error.ranks or (comm.size > 2 and error.ranks != (odd,)):
        return str(error), f"names ranks {error.ranks}: {error}"
    return str(error), "" if f"rank {odd}" in str(error) and says in str(error) else f"does not say {says!r}: {error}"


def faults(cells: list[Any], told: list[list[tuple[str, str]]]) -> list[str]:
    """A line for each cell that failed."""
    lines = []
    for (usual, name, *_), each in zip(cells, zip(*told, strict=True), strict=True):
        wrong = {f"rank {rank} {fault}" for rank, (_, fault) in enumerate(each) if fault}
        if len({text for text, _ in each}) > 1:
            wrong.add(f"ranks are told different things: {[text for text, _ in each]}")
        lines += [f"{usual.call} / {name}: {fault}" for fault in sorted(wrong)]
    return lines


@pytest.mark.parametrize("n", SIZES)
def test_at_the_first_call(n: int) -> None:
    """Each cell on a communicator that has made no call."""

    def one(transport: LoopbackTransport) -> list[tuple[str, str]]:
        told = []
        for cell in CELLS:
            with Communicator(transport, timeout=20) as comm:
                told.append(cell_of(comm, cell))
        return told

    found = faults(CELLS, LoopbackWorld(n).run(one))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("n", SIZES)
def test_at_the_thousandth_call(n: int) -> None:
    """And at those that follow it, on one communicator, whose caches are full."""

    def body(comm: Communicator) -> list[tuple[str, str]]:
        send, total = np.ones((n, 3), np.float32), np.empty((n, 3), np.float32)
        for _ in range(CALLS_BEFORE - len(USUAL)):
            comm.decomposed_allreduce(send, total)
        for usual in USUAL.values():
            usual(comm)
        return [cell_of(comm, cell) for cell in CELLS]

    found = faults(CELLS, on_ranks(n, body))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("first", USUAL)
def test_calls_in_another_order(first: str) -> None:
    """Both calls fail on all ranks, each naming what came."""
    calls = [USUAL[first], next(call for name, call in USUAL.items() if name != first)]

    def body(comm: Communicator) -> list[BaseException | None]:
        order = calls[::-1] if comm.rank == 1 else calls
        told = [attempt(lambda call=call: call(comm)) for call in order]  # type: ignore[misc]
        calls[0](comm)
        return told

    for told in on_ranks(3, body):
        for error in told:
            assert isinstance(error, MismatchError)
            assert error.ranks == (1,)
            assert all(call.call in str(error) for call in calls)


Pair = Callable[[Communicator, Communicator], Any]
ACROSS: dict[str, tuple[Pair, Pair]] = {
    "two communicators in another order": (
        lambda a, b: (USUAL["decomposed_allgather"](a), USUAL["decomposed_allgather"](b)),
        lambda a, b: (USUAL["decomposed_allgather"](b), USUAL["decomposed_allgather"](a)),
    ),
    "a stream on one, a call on the other": (
        lambda a, b: list(a.allgather_steps(np.ones(9))),
        lambda a, b: b.decomposed_allreduce(np.ones(9)),
    ),
    "closed here, called there": (
        lambda a, b: a.decomposed_allreduce(np.ones(9000), async_op=True).wait(),
        lambda a, b: a.close(),
    ),
}


@pytest.mark.parametrize("name", ACROSS)
def test_what_no_agreement_can_see_ends_in_time(name: str) -> None:
    """Ranks that wait for each other on different communicators are told whom they waited for, within the timeout."""
    usual, odd = ACROSS[name]

    def one(transport: LoopbackTransport) -> tuple[BaseException | None, float]:
        a, b = (Communicator(transport, timeout=0.5) for _ in range(2))
        begun = time.monotonic()
        error = attempt(lambda: (odd if transport.rank == 1 else usual)(a, b))
        took = time.monotonic() - begun
        for comm in (a, b):
            if not comm.usable:
                with pytest.raises(CollectiveError, match=r"cannot be used any more|closed"):
                    comm.decomposed_allgather(np.ones(3))
        return error, took

    for rank, (error, took) in enumerate(LoopbackWorld(3).run(one)):
        if rank == 1 and "closed" in name:
            assert error is None
            continue
        assert isinstance(error, PeerTimeoutError), error
        assert 1 in error.peers if rank != 1 else set(error.peers) <= {0, 2}
        assert took < 0.5 + 2 + 5, "on a busy machine"
