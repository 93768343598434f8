"""What goes wrong on one rank is told to all, by name, and harms nothing; silence ends a wait, by name too."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopback_ranks import attempt, on_ranks
from own_schedules import trees
from tasp_coll import (
    ArgumentError,
    CollectiveError,
    Communicator,
    MismatchError,
    PeerTimeoutError,
    Schedule,
    ScheduleError,
    Topology,
    plan,
)
from tasp_coll.transport.loopback import LoopbackTransport, LoopbackWorld, _LoopbackBatch

N, ODD = 4, 2
Call = Callable[[Communicator], Any]


def works(comm: Communicator) -> None:
    """The communicator can be used."""
    for algorithm in ("auto", "rings"):
        x = np.full(1000, comm.rank)
        assert (comm.decomposed_allreduce(x, algorithm=algorithm) == sum(range(comm.size))).all()
    assert [arrival.step for arrival in comm.allgather_steps(np.zeros(9))] == list(range(comm.size))


# --- ranks disagree


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def gather(**options: Any) -> Call:
    return lambda comm: comm.decomposed_allgather(ones(N, 2), **options)


def reduce(**options: Any) -> Call:
    return lambda comm: comm.decomposed_allreduce(ones(N, 2), **options)


def scatter(**options: Any) -> Call:
    return lambda comm: comm.decomposed_reduce_scatter(ones(N, 2), **options)


def steps(**options: Any) -> Call:
    return lambda comm: list(comm.allgather_steps(ones(N, 2), **options))


def walk(shape: tuple[int, ...] = (N, 2), **options: Any) -> Call:
    return lambda comm: list(comm.reduce_scatter_steps(ones(*shape), **options))


class Case(NamedTuple):
    """Calls of the others and of the odd rank, and what the message must say of what was passed."""

    most: Call
    odd: Call
    says: str


DISAGREEMENTS = {
    "shape": Case(
        gather(), lambda c: c.decomposed_allgather(ones(N, 3)), r"shape: rank 2 passed shape \(4, 3\); .*\(4, 2\)"
    ),
    "shape, large": Case(
        lambda c: c.decomposed_allgather(ones(9000)),
        lambda c: c.decomposed_allgather(ones(8999)),
        r"rank 2 passed shape \(8999\); ranks 0, 1, 3 passed shape \(9000\)",
    ),
    "shape, one of them small": Case(
        lambda c: c.decomposed_allgather(ones(9000)),
        lambda c: c.decomposed_allgather(ones(1)),
        r"rank 2 passed shape \(1\)",
    ),
    "dimensions": Case(gather(), lambda c: c.decomposed_allgather(ones(N, 2, 1)), r"rank 2 passed shape \(4, 2, 1\)"),
    "dtype": Case(
        gather(),
        lambda c: c.decomposed_allgather(ones(N, 2, dtype=np.int32)),
        "dtype: rank 2 passed dtype int32; ranks 0, 1, 3 passed dtype float32",
    ),
    "row shape": Case(
        lambda c: c.decomposed_allgatherv(ones(c.rank, 2)),
        lambda c: c.decomposed_allgatherv(ones(c.rank, 3)),
        r"row_shape: rank 2 passed row_shape \(3\); ranks 0, 1, 3 passed row_shape \(2\)",
    ),
    "op": Case(reduce(), reduce(op="max"), "op: rank 2 passed op max; ranks 0, 1, 3 passed op sum"),
    "algorithm": Case(
        gather(algorithm="ring"), gather(algorithm="rings"), "algorithm: rank 2 passed algorithm rings; .* ring"
    ),
    "algorithm, inline": Case(gather(), gather(algorithm="ring"), "rank 2 passed algorithm ring; .* algorithm auto"),
    "schedule": Case(
        lambda c: c.decomposed_allgather(ones(2), algorithm=plan(c.topology, "allgather", "direct")),
        lambda c: c.decomposed_allgather(ones(2), algorithm=trees(c.topology, "allgather")),
        "rank 2 passed algorithm schedule [0-9a-f]{32}",
    ),
    "rings": Case(
        gather(algorithm="rings", rings=2),
        gather(algorithm="rings", rings=3),
        "rings: rank 2 passed rings 3; ranks 0, 1, 3 passed rings 2",
    ),
    "rings or not": Case(gather(algorithm="rings"), gather(algorithm="rings", rings=3), "rank 2 passed rings 3"),
    "counts": Case(
        scatter(counts=(1, 1, 1, 1)),
        scatter(counts=(4, 0, 0, 0)),
        r"counts: rank 2 passed counts \(4, 0, 0, 0\); .*\(1, 1, 1, 1\)",
    ),
    "counts or not": Case(scatter(), scatter(counts=(4, 0, 0, 0)), r"rank 2 passed counts \(4, 0, 0, 0\)"),
    "collective": Case(
        gather(),
        reduce(),
        "rank 2 passed call decomposed_allreduce.*; ranks 0, 1, 3 passed call decomposed_allgather",
    ),
    "steps or not": Case(steps(), gather(), "rank 2 passed call decomposed_allgather"),
    "reverse": Case(steps(), steps(reverse=True), "reverse: rank 2 passed reverse reverse"),
    "rings of steps": Case(steps(rings=1), steps(rings=2), "rings: rank 2 passed rings 2"),
    "row shape of steps": Case(walk(), walk((N, 3)), r"rank 2 passed row_shape \(3\)"),
    "algorithm of steps": Case(walk(algorithm="ring"), walk(algorithm="direct"), "rank 2 passed algorithm direct"),
    "all to all": Case(
        lambda c: c.all_to_all(ones(N)), lambda c: c.all_to_all(ones(2 * N)), r"rank 2 passed shape \(8\)"
    ),
    "async": Case(
        lambda c: c.decomposed_allreduce(ones(3), async_op=True).wait(),
        lambda c: c.decomposed_allreduce(ones(4), async_op=True).wait(),
        r"rank 2 passed shape \(4\)",
    ),
    # An argument of the odd rank's own that cannot be meant.
    "bad op": Case(
        reduce(), reduce(op="xor"), "rank 2 could not take part: rank 2: ArgumentError: op must be .* 'xor'"
    ),
    "bad type of op": Case(reduce(), reduce(op=["sum"]), "rank 2 could not take part"),
    "bad algorithm": Case(gather(), gather(algorithm="fast"), "algorithm must be one of .* got 'fast'"),
    "bad type of algorithm": Case(gather(), gather(algorithm=["ring"]), "rank 2 could not take part"),
    "bad rings": Case(gather(), gather(algorithm="rings", rings=99), "rings must be an integer from 1 to 6.* got 99"),
    "bad rings and algorithm": Case(gather(), gather(algorithm="ring", rings=2), "rings applies to algorithm 'rings'"),
    "bad counts": Case(scatter(), scatter(counts=(1, 2)), "counts must be 4 integers >= 0 that add up"),
    "bad type of counts": Case(scatter(), scatter(counts="many"), "counts must be 4 integers >= 0"),
    "bad part of counts": Case(scatter(), scatter(counts=(1, 1, 1, 1.5)), "counts must be 4 integers >= 0"),
    "no array": Case(gather(), lambda c: c.decomposed_allgather({}), "ArgumentTypeError: send must be an array"),
    "objects": Case(
        gather(), lambda c: c.decomposed_allgather(np.array([{}])), "send must have elements of plain bytes"
    ),
    "no arithmetic": Case(reduce(), lambda c: c.decomposed_allreduce(np.zeros(8, "M8[s]")), "dtype must be reducible"),
    "rows that do not divide": Case(
        scatter(), lambda c: c.decomposed_reduce_scatter(ones(N + 1, 2)), "send must have an axis 0 that 4 ranks divide"
    ),
    "no axis 0": Case(steps(), lambda c: list(c.allgather_steps(np.float32(1))), "an axis 0 is needed"),
    "steps by schedule": Case(steps(), steps(algorithm="native"), "to go step by step, got 'native'"),
    "bad recv": Case(gather(), gather(recv=np.empty(3, np.float32)), r"recv must have shape \(16, 2\), got \(3,\)"),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("name", list(DISAGREEMENTS))
def test_one_odd_rank(name: str, warm: bool) -> None:
    case = DISAGREEMENTS[name]

    def body(comm: Communicator) -> BaseException | None:
        if warm:
            works(comm)
            case.most(comm)
        call = case.odd if comm.rank == ODD else case.most
        error = attempt(lambda: call(comm))
        again = attempt(lambda: call(comm))  # every time, not only the first
        assert str(again) == str(error)
        works(comm)
        case.most(comm)
        return error

    errors = on_ranks(N, body)
    for error in errors:
        assert isinstance(error, MismatchError)
        assert error.ranks == (ODD,)
        assert "rank 2" in str(error)
    with pytest.raises(MismatchError, match=case.says):
        raise errors[0]  # type: ignore[misc]
    assert len(set(map(str, errors))) == 1, "all are told the same"


def test_every_rank_passes_something_else() -> None:
    def body(comm: Communicator) -> BaseException | None:
        error = attempt(lambda: comm.decomposed_allgather(ones(comm.rank + 1)))
        works(comm)
        return error

    for error in on_ranks(3, body):
        assert isinstance(error, MismatchError)
        assert error.ranks == (0, 1, 2)
        for rank in range(3):
            assert f"rank {rank} passed shape ({rank + 1})" in str(error)


def test_two_ranks_have_bad_arguments() -> None:
    def body(comm: Communicator) -> BaseException | None:
        op = {1: "xor", 3: ["sum"]}.get(comm.rank, "sum")
        error = attempt(lambda: comm.decomposed_allreduce(ones(3), op=op))  # type: ignore[arg-type]
        works(comm)
        return error

    for error in on_ranks(N, body):
        assert isinstance(error, MismatchError)
        assert error.ranks == (1, 3)
        assert "'xor'" in str(error)


def test_long_descriptions_are_cut_short_but_told() -> None:
    """Field names of a structured dtype that do not fit into one message."""
    long = np.dtype([(f"field_of_some_length_{i}", "i4") for i in range(2000)])

    def body(comm: Communicator) -> BaseException | None:
        error = attempt(lambda: comm.decomposed_allgather(np.zeros(2, long if comm.rank == ODD else np.int8)))
        works(comm)
        return error

    for error in on_ranks(N, body):
        assert isinstance(error, MismatchError)
        assert error.ranks == (ODD,)
        assert "field_of_some_length_7" in str(error)


@pytest.mark.parametrize("first", [2, np.int64(2)])
def test_equal_numbers_of_another_type_agree(first: Any) -> None:
    """2 and numpy.int64(2), "sum" and numpy.str_("sum") mean the same, whichever came first."""

    def body(comm: Communicator) -> None:
        for turn in range(2):
            rings = first if (comm.rank == ODD) == (turn == 0) else 2
            op = np.str_("sum") if comm.rank == ODD else "sum"
            comm.decomposed_allgather(ones(2), algorithm="rings", rings=rings)
            comm.decomposed_allreduce(ones(2), op=op)

    on_ranks(N, body)


POOL: dict[str, tuple[int, Callable[[Communicator, Any, Any], Any]]] = {
    "gather": (3000, lambda comm, send, recv: comm.decomposed_allgather(send, recv)),
    "longer gather": (5000, lambda comm, send, recv: comm.decomposed_allgather(send, recv, algorithm="direct")),
    "rings": (3000, lambda comm, send, recv: comm.decomposed_allgather(send, recv, algorithm="rings")),
    "all to all": (3000, lambda comm, send, recv: comm.all_to_all(send, recv[: len(send)])),
    "sum": (3000, lambda comm, send, recv: comm.decomposed_allreduce(send, recv[: len(send)], algorithm="direct")),
    "small": (3, lambda comm, send, recv: comm.decomposed_allreduce(send, recv[: len(send)])),
    "bad": (3000, lambda comm, send, recv: comm.decomposed_allgather(send, recv, algorithm="no such")),
}


def repeated(comm: Communicator, name: str, arrays: dict[str, tuple[Any, Any]], keep: bool) -> Any:
    """One of the calls, on arrays that it always gets or on fresh ones; its result, or what it raised."""
    count, call = POOL[name]
    if not keep or name not in arrays:
        arrays[name] = np.full(count, float(comm.rank)), np.empty(comm.size * count)
    try:
        return call(comm, *arrays[name]).copy()
    except (ArgumentError, MismatchError) as error:
        return error


def right(name: str, result: Any, n: int) -> bool:
    if name == "bad":
        return isinstance(result, ArgumentError)
    each = np.arange(float(n))
    count = POOL[name][0]
    if name in ("sum", "small"):
        return bool((result == each.sum()).all())
    return bool((result == np.repeat(each, count // n if name == "all to all" else count)).all())


@given(data=st.data(), n=st.sampled_from([2, 3, 4]))
@settings(max_examples=30)
def test_disagreements_between_calls_that_are_repeated(data: st.DataObject, n: int) -> None:
    """Calls made before may begin before all have agreed; nothing of that may be left when they do not."""
    names = st.sampled_from(sorted(POOL))
    turn = names.map(lambda name: (name,) * n) | st.tuples(*[names] * n)
    turns = data.draw(st.lists(turn, min_size=4, max_size=14))
    keep = data.draw(st.lists(st.booleans() | st.just(True), min_size=n, max_size=n))

    def body(comm: Communicator) -> list[Any]:
        arrays: dict[str, tuple[Any, Any]] = {}
        for name in sorted(POOL) * 2:
            repeated(comm, name, arrays, True)
        found = [repeated(comm, each[comm.rank], arrays, keep[comm.rank]) for each in turns]
        works(comm)
        return found

    for rank, results in enumerate(on_ranks(n, body)):
        for each, result in zip(turns, results, strict=True):
            if len(set(each)) == 1:
                assert right(each[rank], result, n)
            else:
                assert isinstance(result, MismatchError)


# --- all ranks have the same bad argument


ALL_BAD = {name: case.odd for name, case in DISAGREEMENTS.items() if name.startswith(("bad", "no", "objects", "rows"))}


@pytest.mark.parametrize("name", list(ALL_BAD))
def test_a_mistake_made_on_all_ranks(name: str) -> None:
    """Then it is the argument's error, not a disagreement."""

    def body(comm: Communicator) -> BaseException | None:
        works(comm)
        error = attempt(lambda: ALL_BAD[name](comm))
        works(comm)
        return error

    for error in on_ranks(N, body):
        assert isinstance(error, ArgumentError)
        assert isinstance(error, ValueError)


def test_a_wrong_schedule_is_refused_before_it_runs() -> None:
    def body(comm: Communicator) -> list[BaseException | None]:
        good = plan(comm.topology)
        broken = Schedule.from_steps(comm.topology, "allgather", [*good.steps[:-1], good.steps[-1][1:]])
        sends = [
            attempt(lambda s=s: comm.decomposed_allgather(ones(3), algorithm=s))  # type: ignore[misc]
            for s in (broken, plan(comm.topology, "reduce_scatter"), plan("full_mesh:5"))
        ]
        works(comm)
        return sends

    for unproved, other_collective, other_topology in on_ranks(N, body):
        assert isinstance(unproved, ScheduleError)
        assert "never receives" in str(unproved)
        assert "for allgather on 'full_mesh:4', got one for reduce_scatter" in str(other_collective)
        assert "full_mesh:5" in str(other_topology)


# --- recv


def frozen(array: Any) -> Any:
    array.flags.writeable = False
    return array


def wrong_recvs(like: Any, shape: tuple[int, ...]) -> dict[str, tuple[Any, str]]:
    """recv and what is said of it, for a result of `shape` and like's dtype."""
    return {
        "strided": (np.empty((*shape[:-1], 2 * shape[-1]), like.dtype)[..., ::2], "recv must be contiguous"),
        "read-only": (frozen(np.empty(shape, like.dtype)), "recv must be writable, got a read-only"),
        "too small": (np.empty((shape[0] - 1, *shape[1:]), like.dtype), "recv must have"),
        "too large": (np.empty((shape[0] + 1, *shape[1:]), like.dtype), "recv must have"),
        "transposed": (np.empty(shape[::-1], like.dtype), "recv must have"),
        "dtype": (np.empty(shape, np.int64), "recv must have send's dtype float32, got int64"),
        "no array": ([0.0] * 8, "recv must be an array"),
    }


RESULTS: dict[str, tuple[int, ...]] = {
    "decomposed_allgather": (2 * N * N, 3),
    "decomposed_allgatherv": (2 * N * N, 3),
    "decomposed_reduce_scatter": (2, 3),
    "decomposed_allreduce": (2 * N, 3),
    "all_to_all": (2 * N, 3),
}


@pytest.mark.parametrize("algorithm", ["auto", "rings"])
@pytest.mark.parametrize("name", list(RESULTS))
def test_recv_that_cannot_be_used(name: str, algorithm: str) -> None:
    options = {} if name == "all_to_all" else {"algorithm": algorithm}

    def body(comm: Communicator) -> None:
        send = ones(2 * N, 3)
        for fault in wrong_recvs(send, RESULTS[name]):
            recv, says = wrong_recvs(send, RESULTS[name])[fault]
            # Rows are compared between ranks only where they may differ: there all are told.
            with pytest.raises((ArgumentError, MismatchError), match=says):
                getattr(comm, name)(send, recv, **options)
            good = np.empty(RESULTS[name], send.dtype)
            with pytest.raises(MismatchError, match=f"rank {ODD}.*{says}"):
                getattr(comm, name)(send, recv if comm.rank == ODD else good, **options)
        assert getattr(comm, name)(send, good, **options) is good
        works(comm)

    on_ranks(N, body)


@pytest.mark.parametrize("name", list(RESULTS))
def test_recv_must_not_lie_across_send(name: str) -> None:
    """By some bytes, before or after: never at an even one, where it would be some rank's own part."""

    def body(comm: Communicator) -> None:
        rows, parts = 2 * N, {"decomposed_reduce_scatter": 2, "decomposed_allreduce": 2 * N, "all_to_all": 2 * N}
        wanted = parts.get(name, rows * N)
        for shift in (-1, 1, 3, 5):
            memory = np.zeros(200, np.int8)
            send, recv = memory[80 : 80 + rows], memory[80 + shift : 80 + shift + wanted]
            before = send.copy()
            with pytest.raises((ArgumentError, MismatchError), match=r"overlap|in place"):
                getattr(comm, name)(send, recv)
            assert (send == before).all()
        works(comm)

    on_ranks(N, body)


def test_all_to_all_is_not_in_place() -> None:
    def body(comm: Communicator) -> None:
        send = ones(N)
        with pytest.raises(ArgumentError, match="overlap"):
            comm.all_to_all(send, send)

    on_ranks(N, body)


def test_rows_of_recv_are_compared_between_ranks() -> None:
    """In an allgatherv no rank alone knows how many rows there are."""

    def body(comm: Communicator) -> BaseException | None:
        recv = np.empty(5 if comm.rank == ODD else 6)
        error = attempt(lambda: comm.decomposed_allgatherv(np.zeros(comm.rank), recv))
        works(comm)
        return error

    for error in on_ranks(N, body):
        assert isinstance(error, MismatchError)
        assert error.ranks == (ODD,)
        assert "rank 2: recv must have 6 rows, the sum over ranks, got 5" in str(error)


def test_empty_rows_fill_any_recv() -> None:
    def body(comm: Communicator) -> None:
        recv = np.empty((6, 0))
        assert comm.decomposed_allgatherv(np.zeros((comm.rank, 0)), recv) is recv

    on_ranks(N, body)


@pytest.mark.parametrize(
    "recv, says", [(frozen(np.zeros(8)), "writable"), (np.zeros(16)[::2], "contiguous"), (np.zeros(8, "S1"), "dtype")]
)
def test_recv_of_steps(recv: Any, says: str) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ArgumentError, match=says):
            comm.reduce_scatter_steps(recv)
        with pytest.raises(MismatchError, match=f"rank 2.*{says}"):
            comm.reduce_scatter_steps(recv if comm.rank == ODD else np.zeros(8))
        works(comm)

    on_ranks(N, body)


# --- making a communicator


def made(options: Callable[[int], dict[str, Any]]) -> list[BaseException | None]:
    """What making one raised on each rank; afterwards the same transports must do for another."""

    def one(transport: LoopbackTransport) -> BaseException | None:
        error = attempt(lambda: Communicator(transport, **{"timeout": 20, **options(transport.rank)}))
        with Communicator(transport, timeout=20) as comm:
            works(comm)
        return error

    return LoopbackWorld(N).run(one)


@pytest.mark.parametrize(
    "odd, says",
    [
        ({"topology": "nvswitch:4"}, r"ranks disagree on .*topology.*: rank 2 passed .*nvswitch:4"),
        ({"topology": "nvswitch:5"}, "rank 2: TopologyError: topology 'nvswitch:5' has 5 ranks, but 4 take part"),
        ({"topology": "no_such_thing"}, "rank 2: TopologyError: topology 'no_such_thing'"),
        ({"topology": 7}, "rank 2: ArgumentTypeError: topology must be"),
        ({"timeout": -1}, "rank 2: ArgumentError: timeout must be a number of seconds > 0, got -1"),
        ({"timeout": "soon"}, "timeout must be a number of seconds > 0, got 'soon'"),
        ({"stream": object()}, "stream must be a CUDA stream"),
        ({"self_heal": 2}, "self_heal must be True or False"),
    ],
)
def test_ranks_make_different_communicators(odd: dict[str, Any], says: str) -> None:
    errors = made(lambda rank: odd if rank == ODD else {"topology": "full_mesh:4"})
    for error in errors:
        assert isinstance(error, MismatchError)
        assert error.ranks == (ODD,)
    with pytest.raises(MismatchError, match=says):
        raise errors[0]  # type: ignore[misc]


def test_all_ranks_make_it_wrong() -> None:
    for error in made(lambda rank: {"topology": "full_mesh:5"}):
        assert isinstance(error, CollectiveError)
        assert not isinstance(error, MismatchError)
        assert "has 5 ranks, but 4 take part" in str(error)


def test_one_rank_cannot_read_its_file(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    Topology.preset("full_mesh:4").save(good)
    for error in made(lambda rank: {"topology": tmp_path / "gone.json" if rank == ODD else good}):
        assert isinstance(error, MismatchError)
        assert error.ranks == (ODD,)
        assert "gone.json" in str(error)


def test_a_group_that_is_none() -> None:
    with pytest.raises(ArgumentError, match="group must be None, an mpi4py"):
        Communicator(42)


# --- silence


def silent(n: int, body: Call, quiet: Call | None = None, worlds: list[Any] | None = None) -> list[Any]:
    """body on all ranks but rank 1, which makes a communicator, does `quiet`, and waits for the others to end."""
    ended = threading.Barrier(n)

    def one(transport: LoopbackTransport) -> Any:
        comm = Communicator(transport, timeout=1)
        try:
            return (quiet or (lambda comm: None))(comm) if comm.rank == 1 else body(comm)
        finally:
            ended.wait(30)
            attempt(comm.close)  # a stream that is still open cannot end any more

    world = LoopbackWorld(n)
    if worlds is not None:
        worlds.append(world)  # which outlives this call
    return world.run(one)


def unusable(comm: Communicator) -> None:
    assert not comm.usable
    for call in (comm.decomposed_allgather, comm.allgather_steps, comm.decomposed_allreduce):
        with pytest.raises(CollectiveError, match="cannot be used any more") as caught:
            call(ones(3))
        assert not isinstance(caught.value, PeerTimeoutError)
    with pytest.raises(CollectiveError, match="cannot be used any more"):
        comm.decomposed_allgather(ones(3), async_op=True)


def blames(error: BaseException | None, call: str) -> None:
    assert isinstance(error, PeerTimeoutError)
    assert isinstance(error, TimeoutError)
    assert error.peers == (1,)
    assert error.call == call
    assert f"{call}: no answer from rank 1" in str(error)


@pytest.mark.parametrize("method", ["test_some", "test_all"])
def test_a_library_that_fails_without_saying_with_whom(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(batch: object) -> None:
        raise RuntimeError("see the field of the status")

    ready = threading.Barrier(N)

    def prepare(comm: Communicator) -> None:
        works(comm)
        ready.wait(20)

    def body(comm: Communicator) -> None:
        prepare(comm)
        monkeypatch.setattr(_LoopbackBatch, method, fails)
        error = attempt(lambda: comm.decomposed_allgather(ones(9000), algorithm="rings"))
        assert isinstance(error, CollectiveError)
        assert isinstance(error.__cause__, RuntimeError)
        said = "decomposed_allgather failed in the loopback transport with messages of rank"
        assert re.match(rf"{said}s? .* under way: see the field", str(error))
        with pytest.raises(CollectiveError, match=r"failed earlier with messages of ranks? .* under way"):
            comm.decomposed_allgather(ones(3))
        unusable(comm)

    silent(N, body, prepare)


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
def test_a_rank_that_does_not_call(warm: bool) -> None:
    def body(comm: Communicator) -> float:
        if warm:
            works(comm)
        begun = time.monotonic()
        error = attempt(lambda: comm.decomposed_allgather(ones(9000), algorithm="rings"))
        blames(error, "decomposed_allgather")
        waited = time.monotonic() - begun
        unusable(comm)
        return waited

    for waited in silent(N, body, works if warm else None):
        assert waited is None or 0.9 < waited < 8


@pytest.mark.parametrize("calls", [1, 3], ids=["first call", "repeated call"])
def test_arrays_of_a_failed_call_stay_alive(calls: int) -> None:
    """A transport may be reading and writing there still, and not all can take that back."""

    def body(comm: Communicator) -> tuple[Any, Any]:
        send, recv = np.ones(9000), np.empty(3 * 9000)
        for _ in range(calls - 1):
            comm.decomposed_allgather(send, recv)
        blames(attempt(lambda: comm.decomposed_allgather(send, recv)), "decomposed_allgather")
        return weakref.ref(send), weakref.ref(recv)

    def quiet(comm: Communicator) -> None:
        for _ in range(calls - 1):
            comm.decomposed_allgather(np.ones(9000))

    worlds: list[Any] = []
    found = silent(3, body, quiet, worlds)
    gc.collect()
    for references in (found[0], found[2]):
        assert all(reference() is not None for reference in references)


def test_a_rank_that_misses_async_operations() -> None:
    """Whoever waits is told, each time; the operations behind cannot run any more."""

    def body(comm: Communicator) -> None:
        first = comm.decomposed_allreduce(ones(9000), async_op=True)
        second = comm.decomposed_allgather(ones(9000), async_op=True)
        for _ in range(2):
            blames(attempt(first.wait), "decomposed_allreduce")
        assert first.test()
        for _ in range(2):
            assert isinstance(attempt(second.wait), CollectiveError)
        assert second.test()
        unusable(comm)

    silent(3, body)


def test_nobody_waits_for_an_operation_that_cannot_end() -> None:
    """`test` alone must come to an end as well: the background has the same timeout."""

    def body(comm: Communicator) -> None:
        work = comm.decomposed_allreduce(ones(9000), async_op=True)
        until = time.monotonic() + 15
        while not work.test() and time.monotonic() < until:
            time.sleep(0.01)
        assert work.test()
        blames(attempt(work.wait), "decomposed_allreduce")

    silent(3, body)


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_rank_that_stops_in_the_middle_of_a_stream(accumulate: bool) -> None:
    """It has staging for two steps; those that wait for the third say who holds them up."""

    def opened(comm: Communicator) -> Iterator[object]:
        if accumulate:
            return comm.reduce_scatter_steps(ones(100), accumulate=True)
        return comm.allgather_steps(ones(100), donate=comm.rank % 2 == 0)

    def body(comm: Communicator) -> None:
        error = attempt(lambda: list(opened(comm)))
        blames(error, "reduce_scatter_steps" if accumulate else "allgather_steps")
        assert isinstance(error, PeerTimeoutError)
        assert error.step is not None
        unusable(comm)

    def quiet(comm: Communicator) -> None:
        quiet.stream = opened(comm)  # type: ignore[attr-defined]
        next(quiet.stream)  # type: ignore[attr-defined]

    silent(6, body, quiet)


def test_a_rank_that_makes_no_communicator() -> None:
    def one(transport: LoopbackTransport) -> BaseException | None:
        return None if transport.rank == 1 else attempt(lambda: Communicator(transport, timeout=1))

    errors = LoopbackWorld(3).run(one)
    blames(errors[0], "Communicator")
    blames(errors[2], "Communicator")


def test_a_late_rank_is_told_that_the_others_gave_up() -> None:
    gave_up = threading.Barrier(3)

    def one(transport: LoopbackTransport) -> None:
        comm = Communicator(transport, timeout=30 if transport.rank == 1 else 1)
        if comm.rank == 1:
            gave_up.wait(30)
        begun = time.monotonic()
        with pytest.raises(PeerTimeoutError):
            comm.decomposed_allgather(ones(10))
        if comm.rank != 1:
            gave_up.wait(30)
        else:
            assert time.monotonic() - begun < 10, "at once, not after a timeout of its own"

    LoopbackWorld(3).run(one)


def test_patience_is_for_progress_not_for_the_whole() -> None:
    """A stream whose owner takes longer than the timeout between steps, all in all, is no fault."""

    def body(comm: Communicator) -> None:
        for _arrival in comm.allgather_steps(ones(100)):
            time.sleep(0.7)

    on_ranks(4, body, timeout=2)
