"""What is sent is what was planned: so many rings, to those neighbours, that many bytes, in that order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loopback_ranks import on_ranks
from recording import RecordingTransport, RecordingWorld
from tasp_coll import Communicator, Link, Ring, Topology, decompose
from tasp_coll.core import SLOTS
from tasp_coll.nodes import nodes_of
from tasp_coll.schedule import cut
from tasp_coll.transport import Op

ALIGN = 64  # chunks begin on cache lines
Lanes = dict[tuple[bool, int, int], list[int]]  # (send, peer, ring): sizes in order


def messages(n: int, call: Callable[[Communicator], Any], topology: Topology | None = None) -> list[list[Op]]:
    """Each rank's messages of data in one call."""

    def body(transport: Any) -> list[Op]:
        assert isinstance(transport, RecordingTransport)
        with Communicator(transport, timeout=20, topology=topology) as comm:
            call(comm)
        return transport.started

    return RecordingWorld(n).run(body)


def lanes(ops: list[Op]) -> Lanes:
    found: Lanes = defaultdict(list)
    for op in ops:
        found[op.send, op.peer, op.lane // SLOTS - 1].append(op.nbytes)
    return dict(found)


def planned(rings: tuple[Ring, ...], rank: int, sizes: list[int]) -> Lanes:
    """What a rank sends and receives in an allgather: on ring i, at step t, chunk i of the rank t places back."""
    n = len(sizes)
    bounds = [cut(size, [ring.weight for ring in rings], ALIGN) for size in sizes]
    found: Lanes = defaultdict(list)
    for number, ring in enumerate(rings):
        at = ring.ranks.index(rank)
        for step in range(n - 1):
            for send, peer, origin in ((True, at + 1, at - step), (False, at - 1, at - 1 - step)):
                start, stop = bounds[ring.ranks[origin % n]][number : number + 2]
                if stop > start:
                    found[send, ring.ranks[peer % n], number].append(stop - start)
    return dict(found)


def ring_counts(n: int) -> list[int | None]:
    return [None, *range(1, (2 * n - 2 if n in (4, 6) else max(n - 1, 1)) + 1)]


@pytest.mark.parametrize("n", range(2, 10))
def test_rings_run_as_planned(n: int) -> None:
    mesh = Topology.preset(f"full_mesh:{n}")
    nbytes = 64 * 77 + 5
    for k in ring_counts(n):
        rings = decompose(mesh, k)
        expected = [planned(rings, rank, [nbytes] * n) for rank in range(n)]

        def call(comm: Communicator, k: int | None = k) -> None:
            comm.decomposed_allgather(np.zeros(nbytes, np.uint8), algorithm="rings", rings=k)

        for rank, ops in enumerate(messages(n, call)):
            found = lanes(ops)
            assert found == expected[rank]
            # Said in other words: k rings, n-1 steps, each ring's share of the shard at every step.
            assert {ring for *_, ring in found} == set(range(len(rings)))
            assert {len(sizes) for sizes in found.values()} == {n - 1}
            assert sum(op.nbytes for op in ops if op.send) == (n - 1) * nbytes


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_uneven_shards_travel_whole(n: int) -> None:
    sizes = [(rank * 977) % 2000 * (rank != 1) for rank in range(n)]  # rank 1 has nothing
    rings = decompose(Topology.preset(f"full_mesh:{n}"))

    def call(comm: Communicator) -> None:
        comm.decomposed_allgatherv(np.zeros(sizes[comm.rank], np.uint8), algorithm="rings")

    for rank, ops in enumerate(messages(n, call)):
        assert lanes(ops) == planned(rings, rank, sizes)


@pytest.mark.parametrize("n", range(2, 10))
def test_one_ring_runs_one(n: int) -> None:
    (ring,) = decompose(Topology.preset(f"full_mesh:{n}"), 1)

    def call(comm: Communicator) -> None:
        comm.decomposed_allgather(np.zeros(9999, np.uint8), algorithm="ring")

    for rank, ops in enumerate(messages(n, call)):
        at = ring.ranks.index(rank)
        after, before = ring.ranks[(at + 1) % n], ring.ranks[at - 1]
        assert lanes(ops) == {(True, after, 0): [9999] * (n - 1), (False, before, 0): [9999] * (n - 1)}


@pytest.mark.parametrize("n", range(2, 10))
def test_direct_sends_whole_shards_to_everyone(n: int) -> None:
    def call(comm: Communicator) -> None:
        comm.decomposed_allgather(np.zeros(9999, np.uint8), algorithm="direct")

    for rank, ops in enumerate(messages(n, call)):
        peers = set(range(n)) - {rank}
        assert lanes(ops) == {(send, peer, 0): [9999] for send in (True, False) for peer in peers}


@pytest.mark.parametrize("collective", ["reduce_scatter", "allreduce"])
@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_reductions_take_the_rings_backwards(n: int, collective: str) -> None:
    """Sums of float32 run against the rings; an allreduce then gathers along them."""
    count = 64 * n
    rings = decompose(Topology.preset(f"full_mesh:{n}"))

    def call(comm: Communicator) -> None:
        getattr(comm, f"decomposed_{collective}")(np.ones(n * count, np.float32), algorithm="rings")

    for rank, ops in enumerate(messages(n, call)):
        along = planned(rings, rank, [4 * count] * n)
        expected: Lanes = defaultdict(list)
        for (send, peer, ring), sizes in along.items():
            expected[not send, peer, ring] += sizes
            if collective == "allreduce":
                expected[send, peer, ring] += sizes
        assert {lane: sorted(sizes) for lane, sizes in lanes(ops).items()} == {
            lane: sorted(sizes) for lane, sizes in expected.items()
        }


@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct"])
def test_chunks_are_sent_on_from_where_they_arrived(algorithm: str) -> None:
    """No copy in between: a message leaves from the caller's array, or from where a message came in."""
    shards = [np.zeros(9999, np.uint8) for _ in range(5)]
    results = [np.zeros(5 * 9999, np.uint8) for _ in range(5)]

    def call(comm: Communicator) -> None:
        comm.decomposed_allgather(shards[comm.rank], results[comm.rank], algorithm=algorithm)

    for rank, ops in enumerate(messages(5, call)):
        arrived = {(op.address, op.nbytes) for op in ops if not op.send}
        start, room = shards[rank].ctypes.data, results[rank].ctypes.data
        assert all(room <= address and address + size <= room + 5 * 9999 for address, size in arrived)
        for op in ops:
            own = start <= op.address and op.address + op.nbytes <= start + 9999
            assert not op.send or own or (op.address, op.nbytes) in arrived


def test_small_payloads_come_with_the_agreement() -> None:
    """Nothing else is sent for them, except where rings were asked for by name."""
    for algorithm, count in (("auto", 0), ("direct", 0), ("rings", 2 * 2 * 2)):

        def call(comm: Communicator, algorithm: str = algorithm) -> None:
            comm.decomposed_allgather(np.zeros(200, np.uint8), algorithm=algorithm)

        for ops in messages(3, call):
            assert len(ops) == count


@pytest.mark.parametrize("reverse", [False, True])
def test_steps_run_the_rings_too(reverse: bool) -> None:
    """By whole rows: 7 rows of 8 bytes on 4 rings."""
    n, rows = 5, 7
    rings = decompose(Topology.preset(f"full_mesh:{n}"))
    bounds = cut(rows, [ring.weight for ring in rings])

    def call(comm: Communicator) -> None:
        for _arrival in comm.allgather_steps(np.zeros(rows), reverse=reverse):
            pass

    for rank, ops in enumerate(messages(n, call)):
        expected = {}
        for number, ring in enumerate(ring.reversed() if reverse else ring for ring in rings):
            at = ring.ranks.index(rank)
            sizes = [8 * (bounds[number + 1] - bounds[number])] * (n - 1)
            expected[True, ring.ranks[(at + 1) % n], number] = sizes
            expected[False, ring.ranks[at - 1], number] = sizes
        assert lanes(ops) == expected


# --- rings of any topology


def one_way(n: int) -> Topology:
    """Links in one direction are four times as fast."""
    links = [Link(a, b, rate) for a in range(n) for b, rate in (((a + 1) % n, 4.0), ((a - 1) % n, 1.0))]
    return Topology("one way", n, (), tuple(links))


def slow_link(spec: str) -> Topology:
    plain = Topology.preset(spec)
    links = [Link(u, v, rate / 2 if {u, v} == {0, 1} else rate) for u, v, rate in map(ends, plain.links)]
    return Topology(f"slow link in {spec}", plain.ranks, plain.switches, tuple(links))


def ends(link: Link) -> tuple[int | str, int | str, float]:
    return link.source, link.target, link.GBps


ANYWHERE = [
    Topology.preset("cluster:2x3"),
    Topology.preset("dgx_h100:2"),
    Topology.preset("torus:3x3"),
    Topology.preset("hypercube:3"),
    Topology.preset("full_mesh:6").without_link(2, 4),
    slow_link("torus:2x3"),
    slow_link("full_mesh:5"),
    one_way(5),
]


@pytest.mark.parametrize("topology", ANYWHERE, ids=lambda topology: topology.name)
def test_any_topology_runs_its_rings(topology: Topology) -> None:
    """Chunks as large as their ring is wide, on the planned neighbours."""
    if nodes_of(topology) is None:
        pytest.importorskip("ortools", reason="ortools is not installed: pip install 'tasp-coll[solver]'")
    n, elements = topology.ranks, 1000
    rings = decompose(topology)

    def body(comm: Communicator) -> list[int]:
        shards = [np.arange(elements) + 7 * rank for rank in range(n)]
        for algorithm in ("rings", "ring"):
            everything = comm.decomposed_allgather(shards[comm.rank], algorithm=algorithm)
            assert (everything == np.concatenate(shards)).all()
            total = comm.decomposed_allreduce(shards[comm.rank], algorithm=algorithm)
            assert (total == sum(shards)).all()
            part = comm.decomposed_reduce_scatter(everything * (comm.rank + 1), algorithm=algorithm)
            assert (part == shards[comm.rank] * (n * (n + 1) // 2)).all()
        return mirrored(comm)

    for steps in on_ranks(n, body, topology=topology):
        assert steps == list(range(n - 1))
    plain = np.zeros(elements, np.int64)

    def one_call(comm: Communicator) -> None:
        comm.decomposed_allgather(plain, algorithm="rings")

    for rank, ops in enumerate(messages(n, one_call, topology=topology)):
        assert lanes(ops) == planned(rings, rank, [plain.nbytes] * n)


def mirrored(comm: Communicator) -> list[int]:
    """The steps of a reduce-scatter that ask for the chunks that an allgather in reverse brings one step later."""
    shard = np.arange(40.0)
    backward = list(comm.allgather_steps(shard, algorithm="rings", reverse=True))
    recv, found = np.zeros(40), []
    brought = [{(chunk.source, chunk.ring) for chunk in arrival.chunks} for arrival in backward]
    for request in comm.reduce_scatter_steps(recv, algorithm="rings"):
        for chunk in request.chunks:
            chunk.data[...] = np.arange(chunk.start, chunk.stop)
        asked = {(chunk.source, chunk.ring) for chunk in request.chunks}
        if request.step + 1 < len(brought) and asked == brought[request.step + 1]:
            found.append(request.step)
    assert (recv == comm.size * shard).all()
    return found
