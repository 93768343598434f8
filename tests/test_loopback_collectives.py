"""What the collectives compute, against NumPy, for any shape, dtype, algorithm and number of ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopback_ranks import on_ranks
from own_schedules import trees
from tasp_coll import ArgumentError, Communicator, Link, Topology, decompose, plan
from tasp_coll.core import SLOTS
from tasp_coll.executor import Exchange, Flow
from tasp_coll.reduce_programs import reduce_program
from tasp_coll.reduction import reduction
from tasp_coll.schedule import cut
from tasp_coll.transport import Op
from tasp_coll.transport.loopback import LoopbackWorld

Array = np.ndarray[Any, Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
RECORD = np.dtype([("id", "i4"), ("weight", "f8"), ("tag", "S3")])
INTEGERS = [np.dtype(name) for name in ("int8", "uint16", "int32", "int64")]
FLOATS = [*map(np.dtype, ("float16", "float32", "float64", "complex64")), BFLOAT16]
BOOL = np.dtype(bool)
MOVABLE = [BOOL, *INTEGERS, *FLOATS, RECORD, np.dtype("M8[s]"), np.dtype(">i4")]
UFUNCS: dict[str, Callable[..., Any]] = {
    "sum": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "avg": np.add,
}
few = settings(max_examples=40)

sizes = st.integers(1, 6)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
row_shapes = st.lists(st.integers(0, 4), max_size=2).map(tuple)
seeds = st.integers(0, 2**32 - 1)
large = st.sampled_from([1, 1, 1000])  # times the rows: above what travels with the agreement


@st.composite
def algorithms(draw: st.DrawFn, n: int) -> dict[str, Any]:
    """Keyword arguments that choose an algorithm; "own" stands for a Schedule of the user's."""
    if draw(st.booleans()):
        most = 2 * n - 2 if n in (4, 6) else max(n - 1, 1)
        return {"algorithm": "rings", "rings": draw(st.none() | st.integers(1, most))}
    return {"algorithm": draw(st.sampled_from(["auto", "ring", "direct", "own"]))}


def chosen(comm: Communicator, collective: str, options: dict[str, Any]) -> dict[str, Any]:
    own = options["algorithm"] == "own"
    return {**options, "algorithm": trees(comm.topology, collective)} if own else options


def any_bytes(seed: int, rank: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Whatever bits there may be, those of no meaning included."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.random.default_rng((seed, rank)).integers(0, 256, count, np.uint8)
    return raw.view(dtype).reshape(shape)


def numbers(seed: int, rank: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    rng = np.random.default_rng((seed, rank))
    if dtype == BOOL:
        return np.asarray(rng.integers(0, 2, shape), BOOL)
    if dtype in INTEGERS:
        return any_bytes(seed, rank, shape, dtype)
    values = rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)
    return np.asarray(values + 1j * rng.uniform(-1, 1, shape) if dtype.kind == "c" else values).astype(dtype)


def joined(arrays: list[Array]) -> Array:
    """One after another along axis 0, whatever the dtype (NumPy's own changes byte orders)."""
    whole = np.empty((sum(len(array) for array in arrays), *arrays[0].shape[1:]), arrays[0].dtype)
    return np.concatenate(arrays, out=whole)


def laid_out(array: Array, layout: str) -> Array:
    """The same elements, lying in memory in another way."""
    if layout == "strided" and array.ndim:
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    if layout == "fortran":
        return np.asfortranarray(array) if array.ndim else array
    array.flags.writeable = layout != "readonly"
    return array


def same(found: Array, expected: Array) -> None:
    assert type(found) is np.ndarray
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


# --- gathers: bytes arrive as they were


@given(data=st.data(), n=sizes, shape=shapes, dtype=st.sampled_from(MOVABLE), seed=seeds, times=large)
@few
def test_allgather(
    data: st.DataObject, n: int, shape: tuple[int, ...], dtype: np.dtype[Any], seed: int, times: int
) -> None:
    options = data.draw(algorithms(n))
    layout = data.draw(st.sampled_from(["plain", "strided", "fortran", "readonly"]))
    given_recv = data.draw(st.sampled_from(["none", "given", "stacked", "in place"]))
    shape = (shape[0] * times, *shape[1:]) if shape else ()
    shards = [any_bytes(seed, rank, shape, dtype) for rank in range(n)]
    expected = joined([shard.reshape(1) if not shape else shard for shard in shards])

    def body(comm: Communicator) -> Array:
        mine = shards[comm.rank]
        send, recv = laid_out(mine.copy(), layout), None
        if given_recv == "stacked":
            recv = np.empty((n, *shape), dtype)
        elif given_recv != "none":
            recv = np.empty(expected.shape, dtype)
        if recv is not None and given_recv == "in place":
            rows = len(expected) // n
            send = recv[comm.rank * rows : (comm.rank + 1) * rows].reshape(shape)
            send[...] = mine
        found = comm.decomposed_allgather(send, recv, **chosen(comm, "allgather", options))
        assert recv is None or found is recv
        assert send.tobytes() == mine.tobytes(), "send is never changed"
        return found

    for found in on_ranks(n, body):
        same(found.reshape(expected.shape), expected)


@given(data=st.data(), n=sizes, rest=row_shapes, dtype=st.sampled_from(MOVABLE), seed=seeds, times=large)
@few
def test_allgatherv(
    data: st.DataObject, n: int, rest: tuple[int, ...], dtype: np.dtype[Any], seed: int, times: int
) -> None:
    options = data.draw(algorithms(n))
    rows = [count * times for count in data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))]
    layout = data.draw(st.sampled_from(["plain", "strided", "fortran", "readonly"]))
    given_recv = data.draw(st.lists(st.sampled_from(["none", "given", "in place"]), min_size=n, max_size=n))
    shards = [any_bytes(seed, rank, (rows[rank], *rest), dtype) for rank in range(n)]
    expected = joined(shards)

    def body(comm: Communicator) -> Array:
        mine, mode = shards[comm.rank], given_recv[comm.rank]  # each rank for itself
        send = laid_out(mine.copy(), layout)
        recv = None if mode == "none" else np.empty(expected.shape, dtype)
        if recv is not None and mode == "in place":
            start = sum(rows[: comm.rank])
            send = recv[start : start + rows[comm.rank]]
            send[...] = mine
        found = comm.decomposed_allgatherv(send, recv, **chosen(comm, "allgather", options))
        assert recv is None or found is recv
        assert send.tobytes() == mine.tobytes()
        return found

    for found in on_ranks(n, body):
        same(found, expected)


@given(data=st.data(), n=sizes, rest=row_shapes, dtype=st.sampled_from(MOVABLE), seed=seeds, times=large)
@few
def test_all_to_all(
    data: st.DataObject, n: int, rest: tuple[int, ...], dtype: np.dtype[Any], seed: int, times: int
) -> None:
    block = data.draw(st.integers(0, 3)) * times
    layout = data.draw(st.sampled_from(["plain", "strided", "fortran", "readonly"]))
    give = data.draw(st.booleans())
    sends = [any_bytes(seed, rank, (n * block, *rest), dtype) for rank in range(n)]

    def body(comm: Communicator) -> Array:
        send = laid_out(sends[comm.rank].copy(), layout)
        recv = np.empty(send.shape, dtype) if give else None
        found = comm.all_to_all(send, recv)
        assert recv is None or found is recv
        assert send.tobytes() == sends[comm.rank].tobytes()
        return found

    for rank, found in enumerate(on_ranks(n, body)):
        mine = slice(rank * block, (rank + 1) * block)
        same(found, joined([send[mine] for send in sends]))


# --- reductions


REDUCTIONS = [
    (op, dtype)
    for op in UFUNCS
    for dtype in (BOOL, *INTEGERS, *FLOATS)
    if not (op == "avg" and dtype in (BOOL, *INTEGERS)) and not (op in ("min", "max") and dtype.kind == "c")
]


def close(found: Array, contributions: list[Array], op: str) -> None:
    """Exact for integers, bool, min and max, else within what rounding can do."""
    dtype = contributions[0].dtype
    assert found.dtype == dtype
    if dtype in (BOOL, *INTEGERS) or op in ("min", "max"):
        exact = functools.reduce(UFUNCS[op], contributions)
        assert found.tobytes() == exact.astype(dtype).tobytes()
        return
    wide = [c.astype(np.complex128 if dtype.kind == "c" else np.float64) for c in contributions]
    ideal = functools.reduce(UFUNCS[op], wide)
    size = functools.reduce(UFUNCS[op], [abs(c) for c in wide])
    if op == "avg":
        ideal, size = ideal / len(wide), size / len(wide)
    eps = float(ml_dtypes.finfo(dtype).eps)
    halves = dtype in (BFLOAT16, np.float16)  # accumulated in float32: rounded once
    bound = eps * abs(ideal) + 1e-5 * size if halves else 4 * len(wide) * eps * size
    assert (abs(found.astype(ideal.dtype) - ideal) <= bound).all()


@given(data=st.data(), n=sizes, rest=row_shapes, kind=st.sampled_from(REDUCTIONS), seed=seeds, times=large)
@few
def test_reduce_scatter(
    data: st.DataObject, n: int, rest: tuple[int, ...], kind: tuple[str, np.dtype[Any]], seed: int, times: int
) -> None:
    op, dtype = kind
    options = data.draw(algorithms(n))
    uneven = data.draw(st.none() | st.lists(st.integers(0, 4), min_size=n, max_size=n))
    counts = [c * times for c in uneven] if uneven is not None else None
    parts = counts if counts is not None else [times] * n
    given_recv = data.draw(st.sampled_from(["none", "given", "in place"]))
    layout = data.draw(st.sampled_from(["plain", "strided", "fortran", "readonly"]))
    sends = [numbers(seed, rank, (sum(parts), *rest), dtype) for rank in range(n)]

    def body(comm: Communicator) -> Array:
        start = sum(parts[: comm.rank])
        mine = slice(start, start + parts[comm.rank])
        send = laid_out(sends[comm.rank].copy(), layout if given_recv != "in place" else "plain")
        recv = None
        if given_recv == "given":
            recv = np.empty((parts[comm.rank], *rest), dtype)
        elif given_recv == "in place":
            recv = send[mine]
        asked = chosen(comm, "reduce_scatter", options)
        found = comm.decomposed_reduce_scatter(send, recv, op=op, counts=counts, **asked)
        assert recv is None or found is recv
        if given_recv != "in place":
            assert send.tobytes() == sends[comm.rank].tobytes()
            again = comm.decomposed_reduce_scatter(send, op=op, counts=counts, **asked)
            assert again.tobytes() == found.tobytes(), "the same from run to run"
        return found

    for rank, found in enumerate(on_ranks(n, body)):
        mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
        assert found.shape == (parts[rank], *rest)
        close(found, [send[mine] for send in sends], op)


@given(data=st.data(), n=sizes, shape=shapes, kind=st.sampled_from(REDUCTIONS), seed=seeds, times=large)
@few
def test_allreduce(
    data: st.DataObject, n: int, shape: tuple[int, ...], kind: tuple[str, np.dtype[Any]], seed: int, times: int
) -> None:
    op, dtype = kind
    options = data.draw(algorithms(n))
    shape = (shape[0] * times, *shape[1:]) if shape else ()
    given_recv = data.draw(st.sampled_from(["none", "given", "in place"]))
    layout = data.draw(st.sampled_from(["plain", "strided", "fortran", "readonly"]))
    sends = [numbers(seed, rank, shape, dtype) for rank in range(n)]

    def body(comm: Communicator) -> Array:
        send = laid_out(sends[comm.rank].copy(), layout if given_recv != "in place" else "plain")
        recv = {"none": None, "given": np.empty(shape, dtype), "in place": send}[given_recv]
        asked = chosen(comm, "allreduce", options)
        found = comm.decomposed_allreduce(send, recv, op=op, **asked)
        assert recv is None or found is recv
        again = comm.decomposed_allreduce(sends[comm.rank], op=op, **asked)
        assert again.tobytes() == found.tobytes(), "the same from run to run"
        return found

    everywhere = on_ranks(n, body)
    assert len({found.tobytes() for found in everywhere}) == 1, "the same bits on all ranks"
    assert everywhere[0].shape == shape
    close(everywhere[0], sends, op)


@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct", "own"])
@pytest.mark.parametrize("n", [2, 5, 6])
def test_halves_are_summed_in_float32(n: int, algorithm: str) -> None:
    """256 + 1 is 256 in bfloat16: rounded at every hop, the small contributions would vanish."""

    def body(comm: Communicator) -> None:
        send = np.full(20_000, 256 if comm.rank == 0 else 1, BFLOAT16)
        out = comm.decomposed_allreduce(send, **chosen(comm, "allreduce", {"algorithm": algorithm}))
        assert (out == np.asarray(256 + n - 1, BFLOAT16)).all()

    on_ranks(n, body)


def test_auto_takes_rings_where_links_are_known() -> None:
    """Links so slow that software does not matter."""

    def body(comm: Communicator) -> tuple[str, ...]:
        found = []
        for rows in (10, 100_000):
            comm.decomposed_allgather(np.zeros(rows))
            assert comm.last_choice is not None
            found.append(comm.last_choice.algorithm)
        return tuple(found)

    def chosen(spec: str) -> list[tuple[str, ...]]:
        fast = Topology.preset(spec)
        links = [Link(link.source, link.target, link.GBps / 1e6) for link in fast.links]
        return on_ranks(fast.ranks, body, topology=Topology(spec, fast.ranks, fast.switches, tuple(links)))

    assert chosen("full_mesh:5") == [("direct", "rings")] * 5
    assert chosen("nvswitch:5") == [("direct", "ring")] * 5
    assert chosen("cluster:2x2") == [("direct", "hierarchical")] * 4


def test_all_ranks_reckon_with_the_same_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of rank 0, however many cores the others see."""
    cores = iter(range(1, 100))
    monkeypatch.setattr("os.cpu_count", lambda: next(cores))
    found = on_ranks(4, lambda comm: comm._core.chooser.costs)
    assert len(set(found)) == 1
    assert found[0].message_us > 0


def test_one_ranks_part_in_a_direct_reduction_of_very_many() -> None:
    """All contributions are there at once, in the order that is worst for whoever sums up in the order of ranks."""
    n = 1200
    world = LoopbackWorld(n)
    program = reduce_program(
        plan(f"full_mesh:{n}", "reduce_scatter", "direct", slices=1), 0, [4] * n, reduction("sum", "int64", n)
    )
    send, recv = np.ones(4 * n, np.int64), np.zeros(4, np.int64)
    stage, sink = np.zeros(program.stage_bytes, np.uint8), np.zeros(4, np.int64)
    bases = {"send": send.ctypes.data, "recv": recv.ctypes.data, "stage": stage.ctypes.data}
    exchange = Exchange(program, world.transports[0], bases, 0, SLOTS)
    flow = Flow(exchange)
    for node in reversed([node for node in program.nodes if node.place is not None]):
        address = (sink if node.send else send).ctypes.data
        op = Op(not node.send, 0, (node.lane + 1) * SLOTS, address, 4 * 8)
        world.transports[node.peer].prepare([op]).start([0])
    while not flow.done:
        flow.poll()
    assert recv.tolist() == [n] * 4


# --- several at a time


@given(n=sizes, seed=seeds, rows=st.lists(st.sampled_from([0, 7, 3000]), min_size=1, max_size=6), data=st.data())
@settings(max_examples=15)
def test_async_operations(n: int, seed: int, rows: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(2 * len(rows))))
    algorithm = data.draw(st.sampled_from(["auto", "rings", "ring"]))

    def body(comm: Communicator) -> None:
        inputs = [any_bytes(seed, comm.rank, (count, 2), INTEGERS[2]) for count in rows]
        works = [comm.decomposed_allgather(x, algorithm=algorithm, async_op=True) for x in inputs]
        works += [comm.decomposed_allreduce(x, algorithm=algorithm, async_op=True) for x in inputs]
        inner = comm.decomposed_allreduce(np.ones(3))  # waits its turn
        assert (inner == n).all()
        while not works[order[0]].test():
            pass
        results = {index: works[index].wait() for index in order}  # in any order, on every rank another
        for index, work in enumerate(works):
            assert work.test()
            assert work.wait() is results[index]
        for index, count in enumerate(rows):
            shards = [any_bytes(seed, rank, (count, 2), INTEGERS[2]) for rank in range(n)]
            same(results[index], np.concatenate(shards))
            same(results[index + len(rows)], functools.reduce(np.add, shards))

    on_ranks(n, body)


def test_errors_of_async_operations_come_from_wait_each_time() -> None:
    def body(comm: Communicator) -> None:
        work = comm.decomposed_allreduce(np.zeros(3), op="xor", async_op=True)
        for _ in range(2):
            with pytest.raises(ArgumentError, match="xor"):
                work.wait()
        assert work.test()
        assert (comm.decomposed_allreduce(np.ones(2)) == comm.size).all()

    on_ranks(3, body)


def test_close_finishes_what_is_under_way() -> None:
    def body(comm: Communicator) -> Array:
        work = comm.decomposed_allgather(np.full(5000, comm.rank), algorithm="rings", async_op=True)
        comm.close()
        return work.wait()

    for found in on_ranks(4, body):
        same(found, np.repeat(np.arange(4), 5000))


# --- step by step

Pieces = list[list[tuple[int, int, int, int]]]  # per step (source, ring, start, stop)


def shard(rank: int, rows: int) -> Array:
    return (1000 * rank + np.arange(rows * 2)).reshape(rows, 2)


def gathered(comm: Communicator, rows: list[int], **options: Any) -> Pieces:
    """Walk through `allgather_steps`, checking all that arrives."""
    pieces: Pieces = []
    for number, arrival in enumerate(comm.allgather_steps(shard(comm.rank, rows[comm.rank]), **options)):
        assert arrival.step == number
        for chunk in arrival.chunks:
            assert chunk.data.shape == (chunk.stop - chunk.start, 2)
            assert (chunk.data == shard(chunk.source, rows[chunk.source])[chunk.start : chunk.stop]).all()
            assert not chunk.data.flags.writeable
        pieces.append([(chunk.source, chunk.ring, chunk.start, chunk.stop) for chunk in arrival.chunks])
    return pieces


def summed(comm: Communicator, rows: list[int], **options: Any) -> Pieces:
    """Walk through `reduce_scatter_steps`: rank r contributes 10**r times the row's number."""
    recv = np.full((rows[comm.rank], 2), -1.0)
    pieces: Pieces = []
    for number, request in enumerate(comm.reduce_scatter_steps(recv, **options)):
        assert request.step == number
        for chunk in request.chunks:
            chunk.data[...] = 10.0**comm.rank * np.arange(chunk.start, chunk.stop)[:, None]
        pieces.append([(chunk.source, chunk.ring, chunk.start, chunk.stop) for chunk in request.chunks])
    total = sum(10.0**rank for rank in range(comm.size))
    assert np.allclose(recv, total * np.arange(rows[comm.rank])[:, None], rtol=1e-12)
    return pieces


@st.composite
def step_options(draw: st.DrawFn, n: int) -> dict[str, Any]:
    options = draw(algorithms(n))
    return {"algorithm": "rings"} if options["algorithm"] == "own" else options


def expected_pieces(comm: Communicator, rows: list[int], options: dict[str, Any], reverse: bool) -> Pieces:
    """What each step brings: step t the chunks that started t ranks before this one (after it, in reverse)."""
    n, me = comm.size, comm.rank
    rings = decompose(comm.topology, 1 if options["algorithm"] == "ring" else options.get("rings"))
    weights = [ring.weight for ring in rings]
    bounds = [cut(count, weights) for count in rows]
    steps: Pieces = []
    for t in range(n):
        found = []
        for number, ring in enumerate(rings):
            source = ring.ranks[(ring.ranks.index(me) + (t if reverse else -t)) % n]
            start, stop = bounds[source][number : number + 2]
            found.append((source, number, start, stop))
        steps.append(sorted(piece for piece in found if piece[2] < piece[3]))
    return steps


@given(data=st.data(), n=sizes, reverse=st.booleans())
@settings(max_examples=30)
def test_allgather_steps(data: st.DataObject, n: int, reverse: bool) -> None:
    options = data.draw(step_options(n))
    rows = data.draw(st.lists(st.sampled_from([0, 1, 5, 20, 400]), min_size=n, max_size=n))

    def body(comm: Communicator) -> None:
        pieces = gathered(comm, rows, reverse=reverse, **options)
        if options["algorithm"] != "direct":
            assert [sorted(step) for step in pieces] == expected_pieces(comm, rows, options, reverse)
        assert {piece[0] for piece in pieces[0]} == ({comm.rank} if rows[comm.rank] else set())
        assert all(piece[0] != comm.rank for step in pieces[1:] for piece in step)
        covered = sorted((source, start, stop) for step in pieces for source, _, start, stop in step)
        everything = [(source, row) for source in range(n) for row in range(rows[source])]
        assert [(source, row) for source, start, stop in covered for row in range(start, stop)] == everything

    on_ranks(n, body)


@given(data=st.data(), n=sizes)
@settings(max_examples=30)
def test_reduce_scatter_steps_mirror_allgather_steps(data: st.DataObject, n: int) -> None:
    options = data.draw(step_options(n))
    rows = data.draw(st.lists(st.sampled_from([0, 1, 5, 20, 400]), min_size=n, max_size=n))

    def body(comm: Communicator) -> None:
        brought = gathered(comm, rows, reverse=True, **options)
        asked = summed(comm, rows, **options)
        assert [sorted(step) for step in asked[:-1]] == [sorted(step) for step in brought[1:]]
        assert sorted(asked[-1]) == sorted(brought[0]), "own chunks last"

    on_ranks(n, body)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "complex64", BFLOAT16])
@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct"])
def test_reduce_scatter_steps_of_any_dtype(dtype: Any, algorithm: str) -> None:
    def body(comm: Communicator) -> None:
        recv = np.zeros((30, 3), dtype)
        for request in comm.reduce_scatter_steps(recv, algorithm=algorithm):
            for chunk in request.chunks:
                chunk.data[...] = 1 + comm.rank
        assert (recv == np.asarray(15, dtype)).all()

    on_ranks(5, body)


def test_side_by_side_gradients_go_home() -> None:
    """KV comes round backwards while its gradients go the same way, one step behind: attention's backward."""
    rows = [40, 0, 33, 7, 40]

    def body(comm: Communicator) -> None:
        grad = np.zeros((rows[comm.rank], 2))
        kv = comm.allgather_steps(shard(comm.rank, rows[comm.rank]), reverse=True)
        own = [(chunk.start, np.array(chunk.data)) for chunk in next(kv).chunks]
        for request in comm.reduce_scatter_steps(grad):
            arrival = next(kv, None)
            values = [(chunk.start, chunk.data) for chunk in arrival.chunks] if arrival is not None else own
            for chunk, (start, value) in zip(request.chunks, values, strict=True):
                assert chunk.start == start
                chunk.data[...] = (comm.rank + 1) * value
        assert (grad == 15 * shard(comm.rank, rows[comm.rank])).all()

    on_ranks(5, body)


def test_several_streams_and_a_collective_inside() -> None:
    rows = [50, 20, 0, 50]

    def body(comm: Communicator) -> None:
        mine = shard(comm.rank, rows[comm.rank])
        streams = [comm.allgather_steps(mine, algorithm=a) for a in ("rings", "ring", "rings", "ring")]
        recv = np.zeros((rows[comm.rank], 2))
        sums = comm.reduce_scatter_steps(recv)
        for arrivals in zip(*streams, sums, strict=True):
            for arrival in arrivals[:-1]:
                for chunk in arrival.chunks:
                    expected = shard(chunk.source, rows[chunk.source])[chunk.start : chunk.stop]
                    assert (chunk.data == expected).all()
            for chunk in arrivals[-1].chunks:
                chunk.data[...] = 1
            assert (comm.decomposed_allreduce(np.ones(3000), algorithm="rings") == comm.size).all()
        assert (recv == comm.size).all()

    on_ranks(4, body)


def test_seven_streams_at_once_and_no_more() -> None:
    def body(comm: Communicator) -> None:
        mine = shard(comm.rank, 12)
        streams = [comm.allgather_steps(mine) for _ in range(7)]
        with pytest.raises(ArgumentError, match="7 streams"):
            comm.allgather_steps(mine)
        streams.pop().close()
        streams.append(comm.allgather_steps(mine))
        for stream in streams:
            assert len(list(stream)) == comm.size

    on_ranks(3, body)


@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_leaving_a_loop_early(steps: int, algorithm: str) -> None:
    """More often than there may be streams at once: each must have ended when its loop was left."""

    def body(comm: Communicator) -> None:
        for _ in range(9):
            for arrival in comm.allgather_steps(shard(comm.rank, 400), algorithm=algorithm):
                if arrival.step == steps:
                    break
            recv = np.zeros((400, 2))
            for request in comm.reduce_scatter_steps(recv, algorithm=algorithm):
                for chunk in request.chunks:
                    chunk.data[...] = 1
                if request.step == steps:
                    break
        assert (
            len(gathered(comm, [400] * comm.size, algorithm=algorithm))
            == len(plan(comm.topology, "allgather", algorithm).steps) + 1
        )

    on_ranks(4, body)


def test_an_exception_in_the_loop_leaves_it_properly() -> None:
    def failing(comm: Communicator) -> None:
        for arrival in comm.allgather_steps(shard(comm.rank, 400)):
            assert arrival.step // 0

    def body(comm: Communicator) -> None:
        for _ in range(9):
            with pytest.raises(ZeroDivisionError):
                failing(comm)
        gathered(comm, [400] * comm.size)

    on_ranks(3, body)


def test_closing_a_stream() -> None:
    def body(comm: Communicator) -> None:
        with comm.allgather_steps(shard(comm.rank, 400)) as stream:
            next(stream)
        stream.close()  # again: nothing
        with pytest.raises(StopIteration):
            next(stream)
        gathered(comm, [400] * comm.size)

    on_ranks(3, body)


def test_an_open_stream_survives_many_other_calls() -> None:
    """More plans than are kept come between two steps of a stream; its own must stay."""

    def body(comm: Communicator) -> None:
        mine = shard(comm.rank, 500)
        stream = comm.allgather_steps(mine)
        next(stream)
        for rows in range(80):
            comm.decomposed_allgather(np.zeros(rows + 1), algorithm="ring")
        for arrival in stream:
            for chunk in arrival.chunks:
                assert (chunk.data == shard(chunk.source, 500)[chunk.start : chunk.stop]).all()

    on_ranks(3, body)


def test_closing_the_communicator_ends_open_streams() -> None:
    """Nothing may write to freed memory afterwards; the stream then has nothing more to give."""

    def body(comm: Communicator) -> None:
        stream = comm.allgather_steps(shard(comm.rank, 500))
        next(stream)
        comm.close()
        assert not comm.usable
        assert list(stream) == []

    on_ranks(3, body)


@pytest.mark.parametrize("spec", ["hypercube:2", "torus:2x2", "cluster:2x2"])
def test_steps_on_other_topologies(spec: str) -> None:
    """`auto` takes what the topology allows."""

    def body(comm: Communicator) -> None:
        gathered(comm, [9, 0, 4, 9])
        summed(comm, [9, 0, 4, 9])

    on_ranks(4, body, topology=spec)
