"""All collectives by all algorithms against NumPy, blocking, asynchronous and step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tasp_coll

ALGORITHMS = ("auto", "rings", "ring", "direct", "native")
ROWS = {"inline": 25, "middle": 2_500, "large": 65_537}  # of 16 bytes: 400 B, 40 KB, 1 MB and a bit
DTYPES = ("bool", "int8", "uint16", "int64", "float32", "float64", "complex64")
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def comm() -> Iterator[tasp_coll.Communicator]:
    with tasp_coll.Communicator(timeout=40) as made:
        yield made


def shard(rank: int, rows: int, dtype: Any = np.float64) -> Array:
    """(rows, 2), different on each rank, small enough that sums over ranks are exact in every dtype."""
    return ((np.arange(rows * 2).reshape(rows, 2) * 7 + rank * 5) % 11 - (rank % 2)).astype(dtype)


def everything(comm: tasp_coll.Communicator, rows: int, dtype: Any = np.float64) -> Array:
    """(n, rows, 2): what all ranks have."""
    return np.stack([shard(rank, rows, dtype) for rank in range(comm.size)])


def mine(comm: tasp_coll.Communicator, counts: list[int]) -> slice:
    start = sum(counts[: comm.rank])
    return slice(start, start + counts[comm.rank])


def uneven(comm: tasp_coll.Communicator, rows: int) -> list[int]:
    """Rows per rank, none on the first of several."""
    return [rows * (2 * rank % 3) + rank if rank or comm.size == 1 else 0 for rank in range(comm.size)]


def test_own_shard_is_sent_from_the_result(comm: tasp_coll.Communicator) -> None:
    """Where others read it there faster: results of 4 MiB and more."""
    rows = 140_001
    send, recv = shard(comm.rank, rows), np.full((comm.size * rows, 2), -99.0)
    before, expected = send.copy(), everything(comm, rows).reshape(-1, 2)
    for _ in range(2):
        recv[...] = -99
        assert comm.decomposed_allgather(send, recv, algorithm="direct") is recv
        assert np.array_equal(recv, expected)
    recv[...] = -99
    comm.decomposed_allgather(send, recv, algorithm="direct", async_op=True).wait()
    assert np.array_equal(recv, expected)
    assert np.array_equal(send, before)
    counts = uneven(comm, rows)
    out = comm.decomposed_allgatherv(shard(comm.rank, counts[comm.rank]), algorithm="direct")
    assert np.array_equal(out, np.concatenate([shard(rank, n) for rank, n in enumerate(counts)]))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_allgather(comm: tasp_coll.Communicator, algorithm: str, rows: int) -> None:
    send, expected = shard(comm.rank, rows), everything(comm, rows).reshape(-1, 2)
    before = send.copy()
    made = comm.decomposed_allgather(send, algorithm=algorithm)
    assert made.dtype == send.dtype
    assert np.array_equal(made, expected)
    given = np.full_like(expected, -99)
    for _ in range(3):  # the same arrays again, with other values in them
        assert comm.decomposed_allgather(send, given, algorithm=algorithm) is given
        assert np.array_equal(given, expected)
        given[:] = -99
    place = slice(comm.rank * rows, (comm.rank + 1) * rows)
    given[place] = send
    comm.decomposed_allgather(given[place], given, algorithm=algorithm)
    assert np.array_equal(given, expected)
    assert np.array_equal(send, before)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_allgatherv(comm: tasp_coll.Communicator, algorithm: str, rows: int) -> None:
    counts = uneven(comm, rows // 2)
    send = shard(comm.rank, counts[comm.rank])
    expected = np.concatenate([shard(rank, count) for rank, count in enumerate(counts)])
    assert np.array_equal(comm.decomposed_allgatherv(send, algorithm=algorithm), expected)
    given = np.full_like(expected, -99)
    assert comm.decomposed_allgatherv(send, given, algorithm=algorithm) is given
    assert np.array_equal(given, expected)
    given[:] = -99
    given[mine(comm, counts)] = send
    comm.decomposed_allgatherv(given[mine(comm, counts)], given, algorithm=algorithm)
    assert np.array_equal(given, expected)
    nothing = comm.decomposed_allgatherv(send[:0], algorithm=algorithm)
    assert nothing.shape == (0, 2)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reduce_scatter(comm: tasp_coll.Communicator, algorithm: str, rows: int) -> None:
    for counts in ([rows // comm.size] * comm.size, uneven(comm, rows // comm.size)):
        named = None if len(set(counts)) == 1 else counts
        send = shard(comm.rank, sum(counts))
        before, part = send.copy(), mine(comm, counts)
        expected = everything(comm, sum(counts)).sum(0)[part]
        made = comm.decomposed_reduce_scatter(send, counts=named, algorithm=algorithm)
        assert np.array_equal(made, expected)
        given = np.full_like(expected, -99)
        assert comm.decomposed_reduce_scatter(send, given, counts=named, algorithm=algorithm) is given
        assert np.array_equal(given, expected)
        assert np.array_equal(send, before)
        comm.decomposed_reduce_scatter(send, send[part], counts=named, algorithm=algorithm)
        assert np.array_equal(send[part], expected)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_allreduce(comm: tasp_coll.Communicator, algorithm: str, rows: int) -> None:
    send, expected = shard(comm.rank, rows), everything(comm, rows).sum(0)
    before = send.copy()
    assert np.array_equal(comm.decomposed_allreduce(send, algorithm=algorithm), expected)
    given = np.full_like(expected, -99)
    assert comm.decomposed_allreduce(send, given, algorithm=algorithm) is given
    assert np.array_equal(given, expected)
    assert np.array_equal(send, before)
    comm.decomposed_allreduce(send, send, algorithm=algorithm)
    assert np.array_equal(send, expected)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_all_to_all(comm: tasp_coll.Communicator, rows: int) -> None:
    rows = rows // comm.size + 1
    every = everything(comm, comm.size * rows)
    expected = every[:, comm.rank * rows : (comm.rank + 1) * rows].reshape(-1, 2)
    assert np.array_equal(comm.all_to_all(every[comm.rank]), expected)
    given = np.full_like(expected, -99)
    assert comm.all_to_all(every[comm.rank], given) is given
    assert np.array_equal(given, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bytes_of_any_dtype_are_gathered(comm: tasp_coll.Communicator, algorithm: str) -> None:
    for dtype in (*DTYPES, "float16", "M8[s]", "S5", ">i4", [("a", "i4"), ("b", "f8")]):
        for rows in (6, 1_500):
            send = np.frombuffer(np.random.default_rng(comm.rank).bytes(rows * np.dtype(dtype).itemsize), dtype)
            got = comm.decomposed_allgather(send, algorithm=algorithm)
            assert got.dtype == send.dtype
            for rank in range(comm.size):
                bits = np.random.default_rng(rank).bytes(send.nbytes)
                assert got[rank * rows : (rank + 1) * rows].tobytes() == bits


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("op", ["sum", "prod", "min", "max"])
def test_reductions(comm: tasp_coll.Communicator, algorithm: str, op: str) -> None:
    reduce = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}[op].reduce
    for dtype in DTYPES:
        if (np.dtype(dtype).kind == "c" and op in ("min", "max")) or (dtype == "bool" and algorithm == "native"):
            continue
        rows = (300 if op == "sum" else 1) * comm.size
        every = everything(comm, rows, dtype)
        if algorithm == "native":  # Open MPI's own sums of 8 and 16 bits saturate where others wrap
            every = (everything(comm, rows) + 1).astype(dtype)
            every[2:] = 1
        expected = reduce(every, axis=0, dtype=dtype)
        send = every[comm.rank]
        whole = comm.decomposed_allreduce(send, op=op, algorithm=algorithm)
        assert whole.dtype == send.dtype
        assert np.array_equal(whole, expected), dtype
        part = comm.decomposed_reduce_scatter(send, op=op, algorithm=algorithm)
        share = rows // comm.size
        assert np.array_equal(part, expected[comm.rank * share : (comm.rank + 1) * share]), dtype


@pytest.mark.parametrize("algorithm", ["auto", "rings", "ring", "direct"])
def test_float16_is_summed_in_float32(comm: tasp_coll.Communicator, algorithm: str) -> None:
    """2048 + 1 is 2048 in float16: adding ones to it one by one would lose them all."""
    for rows in (20, 20_000):
        send = np.full(rows, 2048 if comm.rank == 0 else 1, np.float16)
        expected = np.float16(2048 + comm.size - 1)
        assert (comm.decomposed_allreduce(send, algorithm=algorithm) == expected).all()
        counts = [rows] + [0] * (comm.size - 1)
        part = comm.decomposed_reduce_scatter(send, counts=counts, algorithm=algorithm)
        assert part.shape == (counts[comm.rank],)
        assert (part == expected).all()


@pytest.mark.parametrize("algorithm", ["auto", "rings", "ring", "direct"])
def test_averages(comm: tasp_coll.Communicator, algorithm: str) -> None:
    for dtype, rows in (("float32", 9), ("float64", 5_000), ("float16", 5_000), ("complex128", 5_000)):
        expected = everything(comm, rows, dtype).astype("complex128").sum(0) / comm.size
        got = comm.decomposed_allreduce(shard(comm.rank, rows, dtype), op="avg", algorithm=algorithm)
        assert np.allclose(got, expected, rtol=1e-3 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_rank_has_the_same_bits_and_so_has_every_run(comm: tasp_coll.Communicator, algorithm: str) -> None:
    send = np.random.default_rng(comm.rank).standard_normal(20_000).astype(np.float32)
    first = comm.decomposed_allreduce(send, algorithm=algorithm)
    every = comm.decomposed_allgather(first).reshape(comm.size, -1)
    assert all(row.tobytes() == first.tobytes() for row in every)
    if algorithm != "native":
        assert comm.decomposed_allreduce(send, algorithm=algorithm).tobytes() == first.tobytes()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shapes(comm: tasp_coll.Communicator, algorithm: str) -> None:
    n, rank = comm.size, comm.rank
    assert comm.decomposed_allgather(np.float32(rank), algorithm=algorithm).tolist() == list(range(n))
    for shape in ((1, 40_000), (0, 3), (4, 0), (2, 3, 5)):
        send = np.full(shape, rank + 0.5)
        got = comm.decomposed_allgather(send, algorithm=algorithm)
        assert got.shape == (n * shape[0], *shape[1:])
        assert np.array_equal(
            got, np.repeat(np.arange(n) + 0.5, shape[0]).reshape(-1, *[1] * (len(shape) - 1)) * np.ones(shape[1:])
        )
        assert comm.decomposed_allreduce(send, algorithm=algorithm).shape == shape
    strided = shard(rank, 6_000)[::2]
    got = comm.decomposed_allgather(strided, algorithm=algorithm)
    assert np.array_equal(got, everything(comm, 6_000)[:, ::2].reshape(-1, 2))
    total = comm.decomposed_allreduce(strided.T, algorithm=algorithm)
    assert np.array_equal(total, everything(comm, 6_000)[:, ::2].sum(0).T)


def test_some_of_the_rings(comm: tasp_coll.Communicator) -> None:
    send = shard(comm.rank, 4_001)
    for rings in range(1, len(tasp_coll.decompose(comm.topology)) + 1):
        got = comm.decomposed_allgather(send, rings=rings)
        assert np.array_equal(got, everything(comm, 4_001).reshape(-1, 2))


@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct"])
def test_schedules_of_ones_own(comm: tasp_coll.Communicator, algorithm: str) -> None:
    plan = tasp_coll.plan(comm.topology, "allgather", algorithm)
    own = tasp_coll.Schedule.from_steps(comm.topology, "allgather", plan.steps)
    for schedule in (plan, own):
        got = comm.decomposed_allgather(shard(comm.rank, 3_000), algorithm=schedule)
        assert np.array_equal(got, everything(comm, 3_000).reshape(-1, 2))


# --- asynchronous


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_several_in_flight_while_the_caller_works(comm: tasp_coll.Communicator, rows: int) -> None:
    rows = rows // comm.size + 1
    every = everything(comm, rows * comm.size)
    send, given = every[comm.rank], np.empty((rows, 2))
    part = slice(comm.rank * rows, (comm.rank + 1) * rows)
    works = [
        comm.decomposed_allgather(send, async_op=True, algorithm="rings"),
        comm.decomposed_allreduce(send, async_op=True, algorithm="ring"),
        comm.decomposed_reduce_scatter(send, given, async_op=True, algorithm="direct"),
        comm.all_to_all(send, async_op=True),
        comm.decomposed_allgatherv(send[: comm.rank], async_op=True),
        comm.decomposed_allreduce(send, async_op=True, op="max", algorithm="native"),
    ]
    caller = np.linspace(0, 1, 5_000)
    for _ in range(20):
        caller = np.sqrt(caller)
    largest = works[5].wait()
    assert all(work.test() for work in works), "they are carried out in order"
    assert np.array_equal(largest, every.max(0))
    assert np.array_equal(works[0].wait(), every.reshape(-1, 2))
    assert np.array_equal(works[1].wait(), every.sum(0))
    assert works[2].wait() is given
    assert np.array_equal(given, every.sum(0)[part])
    assert np.array_equal(works[3].wait(), every[:, part].reshape(-1, 2))
    assert np.array_equal(works[4].wait(), np.concatenate([every[r, :r] for r in range(comm.size)]))
    assert np.array_equal(works[1].wait(), every.sum(0)), "wait gives the result again"


def test_a_blocking_call_runs_after_what_was_submitted_before(comm: tasp_coll.Communicator) -> None:
    x = np.full(50_000, comm.rank, np.int64)
    work = comm.decomposed_allreduce(x, x, async_op=True)
    assert (comm.decomposed_allgather(x) == sum(range(comm.size))).all()
    assert work.wait() is x


@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct", "native"])
def test_data_moves_while_the_caller_computes(comm: tasp_coll.Communicator, algorithm: str) -> None:
    send, caller = shard(comm.rank, 131_072), np.linspace(0, 1, 200_000)
    work = comm.decomposed_allreduce(send, async_op=True, algorithm=algorithm)
    deadline = time.monotonic() + 30
    while not work.done and time.monotonic() < deadline:  # an attribute: nothing here makes progress
        caller = np.sqrt(caller)
    assert work.done
    assert work.test()
    assert np.array_equal(work.wait(), everything(comm, 131_072).sum(0))


# --- step by step


def gathered(comm: tasp_coll.Communicator, rows: list[int], **options: Any) -> list[tuple[int, int, int, int]]:
    """Goes through a stream, checks every chunk, and gives (step, source, start, stop) of each."""
    seen, count = [], 0
    for arrival in comm.allgather_steps(shard(comm.rank, rows[comm.rank]), **options):
        assert arrival.step == count
        count += 1
        for chunk in arrival.chunks:
            assert np.array_equal(chunk.data, shard(chunk.source, rows[chunk.source])[chunk.start : chunk.stop])
            seen.append((arrival.step, chunk.source, chunk.start, chunk.stop))
    assert count == comm.size or options.get("algorithm") == "direct"
    return seen


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("algorithm", ["auto", "rings", "ring", "direct"])
def test_gather_steps(comm: tasp_coll.Communicator, algorithm: str, reverse: bool) -> None:
    for rows in ([5_003] * comm.size, uneven(comm, 700), [1] * comm.size, [0] * comm.size):
        seen = gathered(comm, rows, algorithm=algorithm, reverse=reverse)
        for source in range(comm.size):
            spans = sorted((start, stop) for _, who, start, stop in seen if who == source)
            assert all(start < stop for start, stop in spans), "empty chunks are left out"
            starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
            assert [*starts, rows[source]] == [0, *stops], "every row comes once"
        assert {who for step, who, *_ in seen if step == 0} <= {comm.rank}


@pytest.mark.parametrize("algorithm", ["auto", "rings", "ring", "direct"])
def test_reduce_steps(comm: tasp_coll.Communicator, algorithm: str) -> None:
    for dtype in (np.float64, np.float16, np.int32):
        for rows in ([5_003] * comm.size, uneven(comm, 700), [0] * comm.size):
            sums = np.full((rows[comm.rank], 2), -9, dtype)
            for request in comm.reduce_scatter_steps(sums, algorithm=algorithm):
                for chunk in request.chunks:
                    whole = shard(comm.rank + 3 * chunk.source, rows[chunk.source], dtype)
                    chunk.data[...] = whole[chunk.start : chunk.stop]
            terms = [shard(rank + 3 * comm.rank, rows[comm.rank], dtype) for rank in range(comm.size)]
            assert np.array_equal(sums, np.sum(terms, axis=0, dtype=dtype))


@pytest.mark.parametrize("algorithm", ["rings", "ring"])
def test_gathering_and_reducing_side_by_side(comm: tasp_coll.Communicator, algorithm: str) -> None:
    """The backward of attention: KV comes round in reverse, and each step's gradients belong to what came."""
    held, sums = shard(comm.rank, 803), np.empty((803, 2))
    stream = comm.allgather_steps(held, algorithm=algorithm, reverse=True)
    next(stream)  # the rank's own chunks, whose turn is last
    for request in comm.reduce_scatter_steps(sums, algorithm=algorithm):
        wanted = {(chunk.source, chunk.ring, chunk.start, chunk.stop): chunk.data for chunk in request.chunks}
        if all(source == comm.rank for source, *_ in wanted):
            came = {key: held[key[2] : key[3]] for key in wanted}
        else:
            came = {(chunk.source, chunk.ring, chunk.start, chunk.stop): chunk.data for chunk in next(stream).chunks}
        assert came.keys() == wanted.keys()
        for key, gradient in wanted.items():
            gradient[...] = came[key] * (comm.rank + 1)
    assert next(stream, None) is None
    assert np.array_equal(sums, held * sum(range(1, comm.size + 1)))


def test_streams_and_calls_at_the_same_time(comm: tasp_coll.Communicator) -> None:
    rows = 600
    streams = [comm.allgather_steps(shard(comm.rank, rows) + number) for number in range(7)]
    with pytest.raises(tasp_coll.ArgumentError, match="7 streams"):
        comm.allgather_steps(shard(comm.rank, rows))
    work = comm.decomposed_allreduce(np.ones(90_000), async_op=True)
    for step in range(comm.size):
        for number, stream in enumerate(streams):
            arrival = next(stream)
            assert arrival.step == step
            for chunk in arrival.chunks:
                whole = shard(chunk.source, rows) + number
                assert np.array_equal(chunk.data, whole[chunk.start : chunk.stop])
        assert comm.decomposed_allreduce(np.ones(3_000))[-1] == comm.size
    assert all(next(stream, None) is None for stream in streams)
    assert work.wait()[0] == comm.size


def test_a_stream_outlives_many_other_plans(comm: tasp_coll.Communicator) -> None:
    stream = comm.allgather_steps(shard(comm.rank, 999))
    next(stream)
    for count in range(2_000, 2_070):
        comm.decomposed_allgather(np.zeros(count), algorithm="ring")
    for arrival in stream:
        for chunk in arrival.chunks:
            assert np.array_equal(chunk.data, shard(chunk.source, 999)[chunk.start : chunk.stop])


@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct"])
def test_leaving_a_loop_early_ends_the_stream(comm: tasp_coll.Communicator, algorithm: str) -> None:
    """On any rank, at any step: the other ranks still get everything, and the slot is free again."""
    for turn in range(9):
        for arrival in comm.allgather_steps(shard(comm.rank, 3_000), algorithm=algorithm):
            for chunk in arrival.chunks:
                assert np.array_equal(chunk.data, shard(chunk.source, 3_000)[chunk.start : chunk.stop])
            if arrival.step == (turn + comm.rank) % 3:
                break
        sums = np.zeros((500, 2))
        for request in comm.reduce_scatter_steps(sums, algorithm=algorithm):
            for chunk in request.chunks:
                chunk.data[...] = 0
            if turn % 2 and comm.rank == 0:
                break
        assert comm.decomposed_allreduce(np.ones(4_000))[-1] == comm.size


@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct"])
def test_an_open_stream_is_finished_by_closing(algorithm: str) -> None:
    """Whether the stream is closed, or the communicator under it."""
    with tasp_coll.Communicator(timeout=40) as own:
        for _ in range(9):
            with own.allgather_steps(shard(own.rank, 200_000), algorithm=algorithm) as stream:
                next(stream)
            assert next(stream, None) is None
        stream = own.allgather_steps(shard(own.rank, 200_000), algorithm=algorithm)
        next(stream)
    with pytest.raises((StopIteration, tasp_coll.CollectiveError)):
        next(stream)
    with pytest.raises(tasp_coll.CollectiveError, match="closed"):
        own.decomposed_allgather(np.zeros(3))


def test_a_slow_caller_gets_the_same(comm: tasp_coll.Communicator) -> None:
    """Ranks go at different speeds; what is sent on late, and what waits for room, must not get mixed up."""
    for reverse in (False, True):
        for arrival in comm.allgather_steps(shard(comm.rank, 2_000), reverse=reverse):
            time.sleep(0.004 * ((arrival.step + comm.rank) % 3))
            for chunk in arrival.chunks:
                assert np.array_equal(chunk.data, shard(chunk.source, 2_000)[chunk.start : chunk.stop])


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_over_several_nodes(comm: tasp_coll.Communicator, rows: int) -> None:
    if comm.size not in (4, 8):
        pytest.skip("two nodes need an even number of ranks, two or more in each")
    with tasp_coll.Communicator(topology=f"cluster:2x{comm.size // 2}", timeout=40) as nodes:
        test_allgather(nodes, "hierarchical", rows)
        test_allgatherv(nodes, "hierarchical", rows)
        test_reduce_scatter(nodes, "hierarchical", rows)
        test_allreduce(nodes, "hierarchical", rows)
