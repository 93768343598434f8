"""Streams of steps as users see them: contents, memory, layout and times."""

from __future__ import annotations

import gc
import math
import random
import time
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopback_ranks import on_ranks
from tasp_coll import ArgumentError, CollectiveError, Communicator, MismatchError, Rows, ScheduleError, plan
from tasp_coll.work import Patience

Array = np.ndarray[Any, Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
sizes = st.integers(1, 5)
few = settings(max_examples=25, deadline=None)


def shard(rank: int, rows: int, dtype: Any = np.int64) -> Array:
    return (100 * rank + np.arange(rows * 3) % 97).reshape(rows, 3).astype(dtype)


@st.composite
def options_of(draw: st.DrawFn, n: int, direct: bool = True) -> dict[str, Any]:
    most = 2 * n - 2 if n in (4,) else max(n - 1, 1)
    rings = [{"algorithm": "rings", "rings": draw(st.none() | st.integers(1, most))}, {"algorithm": "ring"}]
    return draw(st.sampled_from([*rings, {"algorithm": "direct"}] if direct else rings))


grains = st.tuples(st.sampled_from([1, 4, 16]), st.sampled_from([0.05, 1]))


def rows_of(n: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from([0, 1, 5, 20, 401]), min_size=n, max_size=n)


def memory(array: Any) -> tuple[int, int]:
    return array.__array_interface__["data"][0], array.nbytes


def dawdle(seed: int, comm: Communicator, step: int) -> None:
    """Ranks go at different speeds, differently at each step."""
    time.sleep(random.Random(f"{seed} {comm.rank} {step}").choice([0, 0, 0, 0.001, 0.003]))


def check_together(arrival: Any) -> None:
    """`data` is all chunks, in the order of source and ring."""
    order = [(chunk.source, chunk.ring, chunk.start) for chunk in arrival.chunks]
    assert order == sorted(order)
    assert arrival.data.shape == (sum(chunk.stop - chunk.start for chunk in arrival.chunks), 3)
    at = 0
    for chunk in arrival.chunks:
        rows = chunk.stop - chunk.start
        assert memory(chunk.data) == memory(arrival.data[at : at + rows])
        at += rows


@given(data=st.data(), n=sizes, reverse=st.booleans(), seed=st.integers(0, 99))
@few
def test_gathering(data: st.DataObject, n: int, reverse: bool, seed: int) -> None:
    """Whoever donates: every row comes once and as it was, step after step from one array."""
    options, rows = data.draw(options_of(n)), data.draw(rows_of(n))
    donors, grain = data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), data.draw(grains)

    def body(comm: Communicator) -> None:
        schedule = plan(comm.topology, "allgather", reverse=reverse, **options)
        send = shard(comm.rank, rows[comm.rank])
        asked = {"donate": donors[comm.rank], "align": grain[0], "stretch": grain[1], **options}
        with comm.allgather_steps(send, reverse=reverse, **asked) as stream:
            assert stream.layout == schedule.arrivals(comm.rank, rows, *grain)
            assert stream.schedule.fingerprint == schedule.fingerprint
            for arrival in stream:
                check_together(arrival)
                assert not arrival.data.flags.writeable
                dawdle(seed, comm, arrival.step)
                found = tuple(Rows(chunk.source, chunk.ring, chunk.start, chunk.stop) for chunk in arrival.chunks)
                assert found == stream.layout[arrival.step]
                for chunk in arrival.chunks:
                    whole = shard(chunk.source, rows[chunk.source])
                    assert (chunk.data == whole[chunk.start : chunk.stop]).all()
        seen = sorted((source, row) for step in stream.layout for source, _, a, b in step for row in range(a, b))
        assert seen == [(source, row) for source in range(n) for row in range(rows[source])]
        if not donors[comm.rank]:
            assert (send == shard(comm.rank, rows[comm.rank])).all()

    on_ranks(n, body)


@pytest.mark.parametrize("donate", [False, True])
def test_staging_and_where_arrivals_lie(donate: bool) -> None:
    n, rows = 4, 16 * 60

    def body(comm: Communicator) -> None:
        send = shard(comm.rank, rows)
        stream = comm.allgather_steps(send, algorithm="rings", donate=donate)
        assert len(stream._driver.compiled.arena.memory) == (1 if donate else 2) * send.nbytes
        places = [memory(arrival.data) for arrival in stream]
        assert places[0] == memory(send)
        assert (places[2] == memory(send)) == donate
        assert places[1] == places[3]

    on_ranks(n, body)


def sums(comm: Communicator, rows: list[int], dtype: Any, weights: list[int]) -> Array:
    terms = [(shard(comm.rank, rows[comm.rank]) * weight).astype(dtype) for weight in weights]
    return np.sum(terms, axis=0, dtype=dtype)


@given(data=st.data(), n=sizes, seed=st.integers(0, 99))
@few
def test_accumulating_beside_a_reversed_gather(data: st.DataObject, n: int, seed: int) -> None:
    """Attention's backward: KV comes round, and the sums of its gradients follow one step behind and go home."""
    options, rows = data.draw(options_of(n, direct=False)), data.draw(rows_of(n))
    dtype = data.draw(st.sampled_from(["i4", "u8", "f4", "f8", "c16"]))
    weights, grain = [rank + 1 for rank in range(n)], data.draw(grains)
    cuts = dict(zip(("align", "stretch"), grain, strict=True))

    def body(comm: Communicator) -> None:
        kv, grad = shard(comm.rank, rows[comm.rank]), np.full((rows[comm.rank], 3), 77, dtype)
        schedule = plan(comm.topology, "reduce_scatter", **options)
        stream = comm.allgather_steps(kv.copy(), reverse=True, donate=True, **cuts, **options)
        homing = comm.reduce_scatter_steps(grad, accumulate=True, **cuts, **options)
        assert homing.layout == schedule.arrivals(comm.rank, rows, *grain)
        assert homing.schedule.fingerprint == schedule.fingerprint
        assert homing.layout == (*stream.layout[1:], stream.layout[0])
        next(stream)
        for request in homing:
            check_together(request)
            dawdle(seed, comm, request.step)
            came = kv if request.step == n - 1 else next(stream).data
            if request.step == 0 and n > 1:
                assert (request.data == 0).all()
            request.data[...] += (came * weights[comm.rank]).astype(dtype)
        assert next(stream, None) is None
        assert (grad == sums(comm, rows, dtype, weights)).all()
        assert request.step == n - 1

    on_ranks(n, body)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_accumulating_stages_two_shards_and_recv(n: int) -> None:
    def body(comm: Communicator) -> None:
        recv = np.full((16 * 60, 3), -1.0)
        stream = comm.reduce_scatter_steps(recv, accumulate=True)
        assert len(stream._driver.compiled.arena.memory) == min(n - 1, 2) * recv.nbytes
        places = []
        for request in stream:
            request.data[...] += comm.rank + 1
            places.append(memory(request.data))
        assert places[-1] == memory(recv)
        assert len(set(places)) == min(n, 3)
        assert (recv == n * (n + 1) / 2).all()

    on_ranks(n, body)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32, "M8[s]", "S3"])
def test_what_is_added_up_is_the_callers_business(dtype: Any) -> None:
    """In the ring's order, in recv's own dtype; or not added at all."""
    dtype = np.dtype(dtype)

    def body(comm: Communicator) -> Array:
        recv = np.zeros((30, 3), dtype)
        for request in comm.reduce_scatter_steps(recv, algorithm="ring", accumulate=True):
            if dtype.kind in "MS":
                request.data[...] = np.array(comm.rank, "i8").astype(dtype)
            else:
                request.data[...] += dtype.type(0.1 * (comm.rank + 1))
        return recv

    found = on_ranks(4, body)
    ring = plan("full_mesh:4", "reduce_scatter", "ring").rings[0].ranks
    for rank, recv in enumerate(found):
        if dtype.kind in "MS":
            assert (recv == np.array(rank, "i8").astype(dtype)).all()
            continue
        before = [ring[(ring.index(rank) - back) % 4] for back in (1, 2, 3)]
        orders = []
        for order in (before[::-1], [ring[(ring.index(rank) + ahead) % 4] for ahead in (3, 2, 1)]):
            total = dtype.type(0)
            for other in [*order, rank]:
                total = dtype.type(total + dtype.type(0.1 * (other + 1)))
            orders.append(total)
        assert (recv == recv[0, 0]).all()
        assert recv[0, 0] in orders


def test_accumulated_sums_repeat_bit_for_bit() -> None:
    values = np.random.default_rng(5).standard_normal((5, 200, 3)).astype("f4")

    def body(comm: Communicator) -> Array:
        recv = np.zeros((40, 3), "f4")
        for request in comm.reduce_scatter_steps(recv, accumulate=True):
            dawdle(random.randrange(1000), comm, request.step)
            for chunk in request.chunks:
                chunk.data[...] += values[comm.rank, 40 * chunk.source :][chunk.start : chunk.stop]
        return recv

    first, second = on_ranks(5, body), on_ranks(5, body)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


@given(data=st.data(), n=sizes)
@few
def test_filling_from_one_array(data: st.DataObject, n: int) -> None:
    options, rows, grain = data.draw(options_of(n)), data.draw(rows_of(n)), data.draw(grains)

    def body(comm: Communicator) -> None:
        recv = np.full((rows[comm.rank], 3), -1)
        stream = comm.reduce_scatter_steps(recv, align=grain[0], stretch=grain[1], **options)
        assert stream.layout == plan(comm.topology, "reduce_scatter", **options).arrivals(comm.rank, rows, *grain)
        for request in stream:
            check_together(request)
            assert (request.began, request.ended) == (None, None)
            parts = [shard(chunk.source, rows[chunk.source])[chunk.start : chunk.stop] for chunk in request.chunks]
            request.data[...] = (comm.rank + 1) * np.concatenate([*parts, shard(0, 0)])
        assert (recv == shard(comm.rank, rows[comm.rank]) * math.comb(n + 1, 2)).all()

    on_ranks(n, body)


def test_times() -> None:
    def body(comm: Communicator) -> None:
        opened = time.perf_counter()
        recv = np.zeros((4000, 3))
        streams = comm.allgather_steps(recv.copy()), comm.reduce_scatter_steps(recv, accumulate=True)
        for arrivals in zip(*streams, strict=True):
            for arrival in arrivals:
                if arrival.step == 0:
                    assert (arrival.began, arrival.ended) == (None, None)
                    continue
                assert arrival.began is not None
                assert arrival.ended is not None
                assert opened <= arrival.began <= arrival.ended <= time.perf_counter()

    on_ranks(4, body)


def test_a_stream_that_waits_for_its_caller_is_left_alone() -> None:
    """All that can come is there after the first naps; what the caller then lets go on arrives all the same."""

    def body(comm: Communicator) -> list[int]:
        polls = []
        with comm.allgather_steps(shard(comm.rank, 30), algorithm="rings") as stream:
            flow: Any = stream._driver.flow
            poll, seen = flow.poll, [0]

            def counted() -> bool:
                seen[0] += 1
                return bool(poll())

            flow.poll = counted
            for arrival in stream:
                assert len(arrival.chunks) or arrival.data is None
                deadline = time.monotonic() + 10
                while not (flow.resting or flow.done) and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert flow.resting or flow.done
                before = seen[0]
                time.sleep(0.3)
                polls.append(seen[0] - before)
        return polls

    for polls in on_ranks(3, body):
        assert max(polls) <= 20, "every 50 ms, not every few"


def test_naps_are_long_where_what_comes_is_early() -> None:
    patience = Patience()
    assert patience.nap() == pytest.approx(5e-5)
    assert patience.nap(0.16) == pytest.approx(0.01)
    assert patience.nap(1e6) == pytest.approx(0.05)
    time.sleep(0.02)
    assert 1e-3 < patience.nap() <= 5e-3
    patience.end()
    assert patience.nap() == pytest.approx(5e-5)


def test_a_stream_knows_how_early_its_steps_are() -> None:
    """By the step that was asked for last; with something else under way nobody is to wait."""

    def body(comm: Communicator) -> list[float]:
        found, engine = [], comm._core.engine
        with comm.allgather_steps(shard(comm.rank, 30), algorithm="rings") as stream:
            for pause, _ in zip((0.5, 0.5, 0.0), stream, strict=False):
                found.append(engine.slack)
                time.sleep(pause)
        assert engine.slack == 0
        return found

    for first, second, third in on_ranks(4, body):
        assert first == 0
        assert 0.1 < second < 5
        assert 0.1 < third < 5


def test_steps_without_anything_to_bring() -> None:
    def body(comm: Communicator) -> None:
        rows = 12 if comm.rank == 1 else 0
        for arrival in comm.allgather_steps(shard(comm.rank, rows), algorithm="ring"):
            if not arrival.chunks:
                assert arrival.data.shape == (0, 3)
                assert arrival.began is None
        for arrival in comm.allgather_steps(np.zeros((5, 0)), algorithm="ring", donate=True):
            assert arrival.data.shape == (0, 0)

    on_ranks(3, body)


def test_data_is_looked_at_before_the_next_step() -> None:
    def body(comm: Communicator) -> None:
        stream = comm.allgather_steps(shard(comm.rank, 50))
        first = next(stream)
        assert first.data is first.data
        second = next(stream)
        with pytest.raises(CollectiveError, match="before the next step"):
            first.chunks[0].data  # noqa: B018
        stream.close()
        with pytest.raises(CollectiveError, match="before the next step"):
            second.data  # noqa: B018
        arrival = next(comm.allgather_steps(shard(comm.rank, 50)))
        with pytest.raises(CollectiveError, match="or the stream's end"):
            arrival.data  # noqa: B018

    on_ranks(3, body)


def test_views_outlive_their_stream() -> None:
    """What they show then is undefined; that there is memory is not."""

    def body(comm: Communicator) -> None:
        send = shard(comm.rank, 50)
        watched = weakref.ref(send)
        stream = comm.allgather_steps(send, donate=True)
        kept = [arrival.data for arrival in stream]
        del send, stream
        gc.collect()
        assert watched() is not None
        assert kept[0].sum() is not None
        del kept
        for _ in range(2):
            comm.decomposed_allreduce(np.ones(3000))
        gc.collect()
        assert watched() is None

    on_ranks(4, body)


def test_other_kinds_of_array() -> None:
    torch = pytest.importorskip("torch")

    def body(comm: Communicator) -> None:
        send = torch.from_numpy(shard(comm.rank, 50, "f4")).bfloat16()
        recv = torch.empty_like(send)
        stream = comm.allgather_steps(send, algorithm="rings", reverse=True, donate=True)
        own = next(stream).data.clone()
        for request in comm.reduce_scatter_steps(recv, algorithm="rings", accumulate=True):
            arrival = next(stream, None)
            came = own if arrival is None else arrival.data
            assert came.dtype == request.data.dtype == torch.bfloat16
            request.data.add_(torch.ones_like(came))
        assert (recv == comm.size).all()

    on_ranks(4, body)


def test_what_is_copied_is_copied_once_and_stays() -> None:
    """JAX: its arrays are immutable, so a step's is made when it is looked at."""
    jax = pytest.importorskip("jax")

    def body(comm: Communicator) -> list[Any]:
        kept = []
        for arrival in comm.allgather_steps(jax.numpy.full((50, 3), comm.rank, "float32"), algorithm="ring"):
            kept.append(arrival.data)
            assert arrival.data is kept[-1]
        with pytest.raises((ArgumentError, MismatchError), match="send must be writable to be donated"):
            comm.allgather_steps(jax.numpy.zeros((50, 3)), donate=True)
        return kept

    for rank, kept in enumerate(on_ranks(3, body)):
        assert {float(array[0, 0]) for array in kept} == {0.0, 1.0, 2.0}
        assert float(kept[0].sum()) == 150 * rank
        assert all((array == array[0, 0]).all() for array in kept)


def test_hierarchical_arrivals_are_apart() -> None:
    def body(comm: Communicator) -> None:
        stream = comm.allgather_steps(shard(comm.rank, 40_000), algorithm="hierarchical")
        together = [arrival.data is not None for arrival in stream]
        assert together[0]
        assert not all(together)

    on_ranks(6, body, topology="cluster:3x2")


@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_leaving_early(steps: int, algorithm: str) -> None:
    """Of a donated gather and of sums: the others get what is there, and slots are free again."""

    def body(comm: Communicator) -> None:
        leaving = comm.rank % 2 == 0
        for _ in range(9):
            for arrival in comm.allgather_steps(shard(comm.rank, 400), algorithm=algorithm, donate=True):
                for chunk in arrival.chunks:
                    assert (chunk.data == shard(chunk.source, 400)[chunk.start : chunk.stop]).all()
                if leaving and arrival.step == steps:
                    break
            if algorithm == "direct":
                continue
            recv = np.zeros((400, 3))
            for request in comm.reduce_scatter_steps(recv, algorithm=algorithm, accumulate=True):
                request.data[...] += 1
                if leaving and request.step == steps:
                    break
            assert (recv >= 0).all()
            assert (recv <= comm.size).all()
            assert leaving or (recv >= 1).all()

    on_ranks(4, body)


def test_many_streams_at_once() -> None:
    def body(comm: Communicator) -> None:
        rows = [20, 0, 35, 20]
        gathers = [comm.allgather_steps(shard(comm.rank, rows[comm.rank]), donate=i % 2 == 0) for i in range(4)]
        recvs = [np.zeros((rows[comm.rank], 3)) for _ in range(3)]
        reduces = [comm.reduce_scatter_steps(recv, accumulate=i < 2) for i, recv in enumerate(recvs)]
        for arrivals in zip(*gathers, *reduces, strict=True):
            for arrival in arrivals[:4]:
                for chunk in arrival.chunks:
                    assert (chunk.data == shard(chunk.source, rows[chunk.source])[chunk.start : chunk.stop]).all()
            for request in arrivals[4:6]:
                request.data[...] += 1
            arrivals[6].data[...] = 1
            assert (comm.decomposed_allreduce(np.ones(3000), algorithm="rings") == comm.size).all()
        assert all((recv == comm.size).all() for recv in recvs)

    on_ranks(4, body)


def test_plans_of_donors_are_found_again() -> None:
    """On all ranks or on none, whoever donates."""

    def body(comm: Communicator) -> None:
        for _ in range(3):
            for donor in (0, 1, None):
                for _arrival in comm.allgather_steps(shard(comm.rank, 60), donate=comm.rank == donor):
                    pass
            planned = comm._core.planned
        assert comm._core.planned == planned

    on_ranks(3, body)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda c: c.reduce_scatter_steps(np.zeros(8), accumulate=True, algorithm="direct"), "got 'direct'"),
        (lambda c: c.reduce_scatter_steps(np.zeros(16)[::2], accumulate=True), "recv must be contiguous"),
        (lambda c: c.allgather_steps(np.zeros(16)[::2], donate=True), "send must be contiguous to be donated"),
        (lambda c: c.allgather_steps(np.broadcast_to(0.0, 8), donate=True), "send must be writable to be donated"),
        (lambda c: c.allgather_steps(np.zeros(8), align=0), "align must be at least 1 row, got 0"),
        (lambda c: c.reduce_scatter_steps(np.zeros(8), align=2.0), "align must be an integer, got 2.0"),
        (lambda c: c.allgather_steps(np.zeros(8), stretch=-0.5), "stretch must be a number >= 0, got -0.5"),
        (lambda c: c.allgather_steps(np.zeros(8), stretch=float("nan")), "stretch must be a number >= 0, got nan"),
        (lambda c: c.reduce_scatter_steps(np.zeros(8), stretch="much"), "stretch must be a number, got 'much'"),
    ],
)
def test_errors_on_one_rank_or_all(call: Any, says: str) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ArgumentError, match=says):
            call(comm)
        with pytest.raises(MismatchError, match=f"rank 1.*{says}"):
            call(comm) if comm.rank == 1 else comm.allgather_steps(np.zeros(8))
        assert (comm.decomposed_allreduce(np.ones(3000)) == 3).all()

    on_ranks(3, body)


def test_integers_of_any_kind_are_the_same_align() -> None:
    def body(comm: Communicator) -> None:
        align: Any = (np.int64(4), 4, np.uint8(4))[comm.rank]
        for arrival in comm.allgather_steps(np.full(64, comm.rank), align=align):
            assert all((chunk.data == chunk.source).all() for chunk in arrival.chunks)

    on_ranks(3, body)


def test_what_is_agreed_and_what_is_not() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(MismatchError, match="rank 1 passed align 16"):
            comm.allgather_steps(np.zeros(8), align=16 if comm.rank == 1 else 1)
        with pytest.raises(MismatchError, match=r"rank 1 passed stretch 1\.0"):
            comm.allgather_steps(np.zeros(8), stretch=1 if comm.rank == 1 else 0.05)
        with pytest.raises(MismatchError, match="accumulate"):
            comm.reduce_scatter_steps(np.zeros(8), accumulate=comm.rank == 1)
        for _arrival in comm.allgather_steps(np.zeros(8), donate=comm.rank == 1):
            pass

    on_ranks(3, body)


def test_arrivals_of_a_schedule() -> None:
    forward = plan("full_mesh:3", algorithm="ring")
    backward = plan("full_mesh:3", algorithm="ring", reverse=True)
    ring = forward.rings[0].ranks
    at = ring.index(0)
    rows = [4, 0, 7]
    for schedule, way in ((forward, -1), (backward, 1)):
        expected = [ring[(at + way * step) % 3] for step in range(3)]
        assert schedule.arrivals(0, rows) == tuple(((s, 0, 0, rows[s]),) if rows[s] else () for s in expected)
    with pytest.raises(ArgumentError, match="rows must be 3 integers"):
        forward.arrivals(0, [1, 2])
    bounds = ((0, 448), (448, 896), (896, 1344), (1344, 1800))
    own = plan("full_mesh:5").arrivals(1, [1800] * 5, np.int64(16))[0]
    assert own == tuple((1, ring, start, stop) for ring, (start, stop) in enumerate(bounds))
    with pytest.raises(ArgumentError, match="align must be an integer >= 1, got 0"):
        forward.arrivals(0, rows, 0)
    with pytest.raises(ArgumentError, match="stretch must be a number >= 0, got -1"):
        forward.arrivals(0, rows, 1, -1)
    with pytest.raises(ArgumentError, match="rank must be from 0 to 2, got 3"):
        forward.arrivals(3, rows)
    with pytest.raises(ScheduleError, match="go step by step"):
        plan("full_mesh:3", "allreduce").arrivals(0, rows)
