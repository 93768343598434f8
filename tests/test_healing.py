"""Links that die under a call: the call ends right, the next ones do without them, and all ranks know."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loopback_ranks import attempt
from tasp_coll import Communicator, Link, LinkWarning, MismatchError, PeerTimeoutError, Topology
from tasp_coll.healing import Healer, derived_pairs, slow_links
from tasp_coll.transport.loopback import LoopbackTransport, LoopbackWorld
from tasp_coll.transport.rates import Sample

TIMEOUT = 1.5  # seconds; a link is given up after 0.6 of it
ROWS = 3000
pytestmark = pytest.mark.filterwarnings("ignore::tasp_coll.LinkWarning")


def ranks(
    n: int, body: Callable[[Communicator, LoopbackWorld], Any], *, timeout: float = TIMEOUT, **options: Any
) -> list[Any]:
    """body(communicator, world) on each of n ranks whose links heal."""
    world = LoopbackWorld(n)

    def one(transport: LoopbackTransport) -> Any:
        with Communicator(transport, timeout=timeout, **{"self_heal": True, **options}) as comm:
            return body(comm, world)

    return world.run(one)


def shard(rank: int, rows: int = ROWS) -> np.ndarray[Any, Any]:
    """Values that tell rank and place."""
    return np.arange(rows, dtype=np.float64) + 1e6 * rank


def gather(comm: Communicator, **options: Any) -> None:
    send = shard(comm.rank)
    recv = np.full(comm.size * ROWS, -1.0)
    assert comm.decomposed_allgather(send, recv, **options) is recv
    assert (recv.reshape(comm.size, ROWS) == np.stack([shard(r) for r in range(comm.size)])).all()
    assert (send == shard(comm.rank)).all(), "send is as it was"


def reduce(comm: Communicator) -> None:
    total = comm.decomposed_allreduce(shard(comm.rank), algorithm="rings")
    assert (total == sum(shard(r) for r in range(comm.size))).all()
    part = comm.decomposed_reduce_scatter(shard(comm.rank, comm.size * 64))
    whole = sum(shard(r, comm.size * 64) for r in range(comm.size))
    assert (part == whole[comm.rank * 64 : (comm.rank + 1) * 64]).all()  # type: ignore[index]


def stream(comm: Communicator, *, reverse: bool = False) -> None:
    seen = np.full((comm.size, ROWS), -1.0)
    for arrival in comm.allgather_steps(shard(comm.rank), algorithm="rings", reverse=reverse):
        for chunk in arrival.chunks:
            seen[chunk.source, chunk.start : chunk.stop] = chunk.data
    assert (seen == np.stack([shard(r) for r in range(comm.size)])).all()


def home(comm: Communicator) -> None:
    """As attention's backward: shards come round one way, and sums of what was made of them go home the other."""
    stream(comm, reverse=True)
    total = np.zeros(ROWS)
    for request in comm.reduce_scatter_steps(total, algorithm="rings", accumulate=True):
        for chunk in request.chunks:
            chunk.data[...] += shard(chunk.source)[chunk.start : chunk.stop] * (comm.rank + 1)
    assert (total == shard(comm.rank) * sum(range(1, comm.size + 1))).all()


CALLS: dict[str, Callable[[Communicator], None]] = {
    "rings": lambda comm: gather(comm, algorithm="rings"),
    "ring": lambda comm: gather(comm, algorithm="ring"),
    "direct": lambda comm: gather(comm, algorithm="direct"),
    "in the background": lambda comm: comm.decomposed_allgather(shard(comm.rank), async_op=True).wait(),
    "sums": reduce,
    "steps": stream,
    "sums step by step": home,
}


@pytest.mark.parametrize("name", list(CALLS))
def test_a_link_that_dies_costs_no_call(name: str) -> None:
    call = CALLS[name]

    def body(comm: Communicator, world: LoopbackWorld) -> str:
        call(comm)
        if comm.rank == 0:
            world.cut(0, 2)
        call(comm)
        gather(comm)
        call(comm)
        return comm.topology.name

    assert ranks(4, body) == ["full_mesh:4 without 0-2"] * 4


def test_later_calls_do_not_use_the_dead_link() -> None:
    def body(comm: Communicator, world: LoopbackWorld) -> None:
        gather(comm, algorithm="rings")
        if comm.rank == 0:
            world.cut(0, 1)
        gather(comm, algorithm="rings")
        assert comm.topology.link(0, 1) is comm.topology.link(1, 0) is None
        rings = comm._core.schedule("allgather", comm.last_choice)  # type: ignore[arg-type]
        used = {(t.src, t.dst) for step in rings.steps for t in step}
        assert not used & {(0, 1), (1, 0)}

    with pytest.warns(LinkWarning, match="ranks 0 and 1 do not reach each other any more: their link is left out"):
        ranks(5, body)


def test_links_die_one_after_another_as_long_as_a_way_is_left() -> None:
    def body(comm: Communicator, world: LoopbackWorld) -> str:
        for a, b in ((0, 1), (2, 3), (0, 2)):
            if comm.rank == 0:
                world.cut(a, b)
            gather(comm)
        return comm.topology.name

    assert ranks(4, body, timeout=3) == ["full_mesh:4 without 0-1 without 2-3 without 0-2"] * 4


def test_two_links_die_at_once() -> None:
    def body(comm: Communicator, world: LoopbackWorld) -> str:
        if comm.rank == 0:
            world.cut(0, 1)
            world.cut(2, 3)
        gather(comm)
        gather(comm)
        return comm.topology.name

    assert ranks(5, body) == ["full_mesh:5 without 0-1 without 2-3"] * 5


def test_streams_that_run_side_by_side_keep_their_plan() -> None:
    """A link that dies between their openings changes no plan before both are closed."""

    def body(comm: Communicator, world: LoopbackWorld) -> str:
        gathered = comm.allgather_steps(shard(comm.rank), algorithm="rings", reverse=True)
        next(gathered)
        if comm.rank == 0:
            world.cut(0, 1)
        for _ in range(2):
            next(gathered)
        total = np.zeros(ROWS)
        with comm.reduce_scatter_steps(total, algorithm="rings", accumulate=True) as requests:
            assert requests.layout == (*gathered.layout[1:], requests.layout[-1])
        gathered.close()
        gather(comm)
        return comm.topology.name

    assert ranks(4, body) == ["full_mesh:4 without 0-1"] * 4


def test_a_link_that_is_soon_back_is_kept() -> None:
    def body(comm: Communicator, world: LoopbackWorld) -> str:
        if comm.rank == 0:
            world.cut(0, 1)
            threading.Timer(0.2 * TIMEOUT, world.mend, (0, 1)).start()
        gather(comm)
        return comm.topology.name

    assert ranks(3, body) == ["full_mesh:3"] * 3


def test_what_a_dead_link_held_back_touches_nothing_when_it_returns() -> None:
    """Late messages find memory of ours, never an array that its owner has back."""

    def body(comm: Communicator, world: LoopbackWorld) -> None:
        if comm.rank == 0:
            world.cut(0, 1)
        send, recv = shard(comm.rank), np.empty(comm.size * ROWS)
        comm.decomposed_allgather(send, recv, algorithm="rings")
        recv[:] = send[:] = 7.0
        if comm.rank == 0:
            world.mend(0, 1)
        gather(comm)
        gather(comm)
        assert (recv == 7).all()
        assert (send == 7).all()

    ranks(4, body)


def test_a_rank_that_never_calls_is_named() -> None:
    """That is no link's fault."""
    over = threading.Barrier(3)

    def body(comm: Communicator, world: LoopbackWorld) -> BaseException | None:
        error = attempt(lambda: gather(comm)) if comm.rank != 2 else None
        over.wait(20)
        return error

    for rank, error in enumerate(ranks(3, body, timeout=0.5)):
        if rank != 2:
            assert isinstance(error, PeerTimeoutError)
            assert error.peers == (2,)
            assert not error.links


@pytest.mark.parametrize("self_heal", [False, True])
def test_without_another_way_the_call_fails(self_heal: bool) -> None:
    def body(comm: Communicator, world: LoopbackWorld) -> BaseException | None:
        if comm.rank == 0:
            world.cut(0, 1)
        return attempt(lambda: gather(comm))

    for error in ranks(2, body, timeout=0.5, self_heal=self_heal):
        assert isinstance(error, PeerTimeoutError)


def test_unhealed_a_call_names_the_link_on_every_rank() -> None:
    def body(comm: Communicator, world: LoopbackWorld) -> BaseException | None:
        gather(comm)
        if comm.rank == 0:
            world.cut(1, 3)
        return attempt(lambda: gather(comm, algorithm="rings"))

    for error in ranks(4, body, timeout=0.5, self_heal=False):
        assert isinstance(error, PeerTimeoutError)
        assert error.links == ((1, 3),)
        assert error.peers == (1, 3)
        assert "ranks 1 and 3 do not hear each other over their link" in str(error)


def test_ranks_must_agree_on_healing() -> None:
    world = LoopbackWorld(3)

    def one(transport: LoopbackTransport) -> BaseException | None:
        return attempt(lambda: Communicator(transport, timeout=1, self_heal=transport.rank == 1))

    for error in world.run(one):
        assert isinstance(error, MismatchError)
        assert error.ranks == (1,)
        assert "self_heal True" in str(error)


# --- slow links


def samples(topology: Topology, slow: dict[tuple[int, int], float], messages: int = 8) -> dict[tuple[int, int], Sample]:
    """What messages of 1 MB between all pairs took, at the rates of the topology times a tenth, but for some."""
    found = {}
    for a in range(topology.ranks):
        for b in set(range(topology.ranks)) - {a}:
            rate = 1e8 * min(topology.GBps(*arc) for arc in topology.path(a, b)) * slow.get((a, b), 1.0)
            found[a, b] = Sample(b, messages, messages * 10**6, messages * 1e6 / rate, rate, 1e6 / rate)
    return found


MESH = Topology("slow enough", 4, (), [*Topology.preset("full_mesh:4").with_rates({(2, 3): 0.5}).links])


def test_a_link_is_slow_beside_the_others_not_beside_its_nominal_rate() -> None:
    assert slow_links(MESH, samples(MESH, {})) == {}
    assert slow_links(MESH, samples(MESH, {(0, 1): 0.1})) == {(0, 1): pytest.approx(0.1)}
    assert slow_links(MESH, samples(MESH, {(0, 1): 0.6})) == {}


def test_few_or_short_messages_are_no_evidence() -> None:
    assert slow_links(MESH, samples(MESH, {(0, 1): 0.1}, messages=5)) == {}
    fast = MESH.with_rates({(link.source, link.target): 1e4 * link.GBps for link in MESH.links})
    assert slow_links(fast, samples(fast, {(0, 1): 0.1})) == {}


def test_a_slow_port_is_found_behind_a_switch() -> None:
    switch = Topology.preset("nvswitch:4")
    slow = {(2, peer): 0.1 for peer in (0, 1, 3)}
    switch = switch.with_rates({(link.source, link.target): 1.0 for link in switch.links})
    assert set(slow_links(switch, samples(switch, slow))) == {(2, switch.switches[0])}


def test_pairs_whose_traffic_crosses_a_dead_link() -> None:
    assert list(derived_pairs(Topology.preset("full_mesh:6"))((1, 4))) == [(1, 4)]
    torus = Topology.preset("torus:4x4")
    for pair in derived_pairs(torus)((0, 1)):
        ways = {*torus.path(*pair), *torus.path(*pair[::-1])}
        assert ways & {(0, 1), (1, 0)}
    assert len(list(derived_pairs(torus)((0, 1)))) > 1
    assert list(derived_pairs(torus)((0, 10))) == [(0, 10)], "no link of theirs"


def test_a_dead_link_without_which_there_is_no_plan_is_told_once_and_kept_in_plans() -> None:
    line = Topology("line", 3, (), [Link(a, b, 1.0) for a, b in ((0, 1), (1, 0), (1, 2), (2, 1))])
    healer = Healer(None, None, line, lambda topology: None, lambda: False)  # type: ignore[arg-type]
    (told,) = healer._exclude([(0, 1)])
    assert "ranks 0 and 1 do not reach each other any more, and nothing leads around" in told
    assert healer._exclude([(0, 1)]) == []
    assert healer._planned(healer._dead) == line
