"""The communicator: what users call.

    with tasp_coll.Communicator() as comm:               # all ranks of mpirun
        out = comm.decomposed_allgather(send)            # (n * d0, *rest)
        work = comm.decomposed_allreduce(x, async_op=True)
        ...
        total = work.wait()

All ranks make the same calls in the same order. Every call begins with an agreement: arguments that differ between
ranks raise MismatchError on all of them and leave the communicator usable; a peer that does not answer within the
timeout raises PeerTimeoutError, after which the communicator refuses further use.
"""

from __future__ import annotations

import atexit
import operator
import os
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tasp_coll import board, bootstrap, checksums, tuning
from tasp_coll.agreement import Rounds
from tasp_coll.collectives import AllGather, AllGatherV, AllReduce, AllToAll, ReduceScatter
from tasp_coll.core import Core, lanes
from tasp_coll.device import stream_handle
from tasp_coll.engine import Engine, abandon_busy
from tasp_coll.errors import ArgumentError, CollectiveError
from tasp_coll.forecast import Case, seconds_of
from tasp_coll.healing import Healer, derived_pairs
from tasp_coll.links import is_integer
from tasp_coll.linkup import gpu_transport_named
from tasp_coll.openings import ACCUMULATE, REVERSE
from tasp_coll.operations import Collective
from tasp_coll.options import ALGORITHMS, Options
from tasp_coll.schedule import STRETCH, Schedule
from tasp_coll.simulate import software_costs
from tasp_coll.streams import GatherStream, ReduceStream, open_gather, open_reduce
from tasp_coll.topology import ENVIRONMENT, Topology
from tasp_coll.transport import Transport
from tasp_coll.transport.healing import HealingTransport

_AUTO = Options()  # made once: a small call has no time to make another
_live: weakref.WeakSet[Communicator] = weakref.WeakSet()


class Communicator:
    """A group of ranks and the plans for its topology. Making one is collective, and so is every method.

    group: None (all ranks that mpirun, srun or torchrun started), an mpi4py.MPI.Intracomm or a
        torch.distributed.ProcessGroup (duplicated, so that messages never meet), or one rank of
        `tasp_coll.transport.loopback.LoopbackWorld`.
    topology: a Topology, a preset's spec or a file's path; None: what TASP_COLL_TOPOLOGY names, else a full mesh of
        equal links.
    timeout: seconds without progress after which a wait ends; None: TASP_COLL_TIMEOUT, else 600.
    stream: the CUDA stream for arrays on a GPU: CuPy's, torch's or a handle; None: the current one of each call's
        framework (for JAX, which has none, CuPy's).
    gpu_transport: what carries arrays on GPUs: "nccl", "ipc" (CUDA IPC and copy engines, between GPUs of one host) or
        "auto" (NCCL, or, where it is missing or refuses ranks that share a GPU, CUDA IPC); None: what
        TASP_COLL_GPU_TRANSPORT names, else "auto".
    self_heal: calls on arrays in host memory outlive dead links. A link on which a peer is silent for half the timeout
        though it answers through others is given up: what it owed goes through other ranks, the call ends with the
        right result, and later ones are planned without it. A link that delivers less than 0.4 of what is usual gets
        that rate. `topology` then tells what is left, and a LinkWarning what happened. It costs each
        call a closing agreement, a copy of every message on either side, acknowledgements, and a thread that answers
        while the program computes; a message must cross its link within a third of the timeout; "native" is not to
        be had. The same on all ranks.

    Raises MismatchError on every rank if ranks were given different topologies or one could not read its own.
    A communicator may be used from several threads; its calls are carried out one after another. It belongs to the
    process that made it: in a forked one every call raises CollectiveError. With TASP_COLL_CHECKSUM=1 in the
    environment of all ranks every message of data carries a checksum: CorruptionError names the link and the step.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        topology: Topology | str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        stream: Any = None,
        gpu_transport: str | None = None,
        self_heal: bool = False,
    ) -> None:
        seconds, error = bootstrap.DEFAULT_TIMEOUT, None
        try:
            seconds = bootstrap.timeout_seconds(timeout)
        except ArgumentError as bad:
            error = bad
        transport = bootstrap.connect(group, seconds)
        handle, carrier = None, "auto"
        try:
            handle, carrier = stream_handle(stream), gpu_transport_named(gpu_transport)
        except ArgumentError as bad:
            error = error or bad
        if self_heal not in (True, False):
            error = error or ArgumentError(f"self_heal must be True or False, got {self_heal!r}")
        self._core = _join(transport, topology, seconds, self_heal is True, error)
        self._core.stream, self._core.gpu_transport = handle, carrier
        _register(self)

    @property
    def rank(self) -> int:
        """This rank's number, 0 to size - 1."""
        return self._core.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._core.size

    @property
    def topology(self) -> Topology:
        """The topology that plans are made for."""
        return self._core.topology

    @property
    def transport(self) -> str:
        """Name of what carries the bytes: "mpi", "torch" (torch.distributed's Gloo) or "loopback"."""
        return self._core.transport.name

    @property
    def gpu_transport(self) -> str | None:
        """Name of what carries arrays on GPUs, "nccl" or "ipc"; None before the first call with one."""
        return self._core.gpu_carrier

    @property
    def usable(self) -> bool:
        """Neither closed nor given up after a failure."""
        return self._core.engine.usable

    @property
    def last_choice(self) -> tuning.Choice | None:
        """What the last completed call ran: algorithm, rings (None: all) and slices; None for a Schedule of yours."""
        return self._core.last_choice

    def __repr__(self) -> str:
        return f"<Communicator rank {self.rank} of {self.size}, {self.topology.name}, {self.transport}>"

    # --- collectives

    def decomposed_allgather(
        self,
        send: Any,
        recv: Any = None,
        *,
        algorithm: str | Schedule = "auto",
        rings: int | None = None,
        async_op: bool = False,
    ) -> Any:
        """Every rank's array on every rank: (d0, *rest) each -> (n * d0, *rest), rank-major; 0-d arrays give (n,).

        send: NumPy, torch, CuPy, JAX or anything with DLPack, `__array_interface__`, `__cuda_array_interface__`
            or the buffer protocol; any dtype; the same shape and dtype on all ranks, and on a GPU on all or on none.
            Never changed; packed once if it is not contiguous. Arrays on GPUs travel by NCCL, in the order of the
            stream (see the constructor): the call returns when the stream has been given everything.
        recv: None (the result is made, of send's kind), or memory for it: writable, contiguous, of send's dtype and
            the result's shape, apart from send, or with send as exactly its own slice of rows (in place).
        algorithm: "rings" (all link-disjoint rings; `rings=k`: k of them), "ring", "direct" (everyone sends to
            everyone), "hierarchical" (several equal nodes: along rails, and inside nodes), "native" (the MPI
            library's own, on GPUs NCCL's), a `Schedule` of your own, or "auto", which takes the fastest by the cost
            model or by the table that `tune` measured, the same on all ranks.
        async_op: return at once with a `Work`, whose `wait()` gives the result and whose `test()` says if it is there;
            data moves in the background. Touch neither array until then.

        Returns the result (recv itself, if given). Raises ArgumentError if all ranks' arguments are bad,
        MismatchError on all ranks if they differ or some are bad, PeerTimeoutError if ranks do not answer.
        """
        options = _AUTO if algorithm is _AUTO.algorithm and rings is None else Options(algorithm, rings)
        return self._call(AllGather, send, recv, options, async_op)

    def decomposed_allgatherv(
        self,
        send: Any,
        recv: Any = None,
        *,
        algorithm: str | Schedule = "auto",
        rings: int | None = None,
        async_op: bool = False,
    ) -> Any:
        """`decomposed_allgather` of arrays whose axis 0 may differ by rank, and may be 0: -> (sum of d0, *rest)."""
        return self._call(AllGatherV, send, recv, Options(algorithm, rings), async_op)

    def decomposed_reduce_scatter(
        self,
        send: Any,
        recv: Any = None,
        *,
        op: str = "sum",
        counts: Sequence[int] | None = None,
        algorithm: str | Schedule = "auto",
        rings: int | None = None,
        async_op: bool = False,
    ) -> Any:
        """This rank's part of the sum over all ranks' arrays: (d0, *rest) -> (its rows, *rest).

        counts: rows of each rank's part, adding up to d0; None: d0 / n each. op: "sum", "prod", "min", "max" or "avg".
        bfloat16 and float16 are accumulated in float32, also on the wire of rings. Results do not change from run to
        run. recv may be exactly this rank's part of send. Else as `decomposed_allgather`.
        """
        return self._call(ReduceScatter, send, recv, Options(algorithm, rings, op, _plain(counts)), async_op)

    def decomposed_allreduce(
        self,
        send: Any,
        recv: Any = None,
        *,
        op: str = "sum",
        algorithm: str | Schedule = "auto",
        rings: int | None = None,
        async_op: bool = False,
    ) -> Any:
        """The sum over all ranks' arrays on every rank, bit for bit the same on all: any shape -> the same shape.

        recv may be send. Else as `decomposed_reduce_scatter`.
        """
        return self._call(AllReduce, send, recv, Options(algorithm, rings, op), async_op)

    def all_to_all(self, send: Any, recv: Any = None, *, async_op: bool = False) -> Any:
        """Block d of axis 0 goes to rank d: (n * b, *rest) -> (n * b, *rest), blocks in the order of their ranks.

        A direct exchange. recv must not overlap send. Else as `decomposed_allgather`.
        """
        return self._call(AllToAll, send, recv, Options("direct"), async_op)

    # --- step by step

    def allgather_steps(
        self,
        send: Any,
        *,
        algorithm: str = "auto",
        rings: int | None = None,
        reverse: bool = False,
        donate: bool = False,
        align: int = 1,
        stretch: float = STRETCH,
    ) -> GatherStream:
        """AllGather one step at a time: while you work on a step, the next one travels.

            for arrival in comm.allgather_steps(kv):
                for chunk in arrival.chunks:          # chunk.source, .ring, .start, .stop
                    work(chunk.data)                  # rows start..stop of source's shard, valid until the next step

        Step 0 brings this rank's own chunks, then n-1 steps the others'; reverse: in the opposite direction round
        each ring. Shards are cut by whole rows, at multiples of `align` where that makes no chunk longer by more than
        `stretch` of its length (a link with a longer chunk takes longer). Axis 0 may differ by rank; empty chunks are
        left out.

        `arrival.data` is all chunks of the step as one array, in the order of `arrival.chunks` (by source, then ring);
        where they do not lie together, as with "hierarchical", it is None. Read both only, and look at them before you
        ask for the next step: they are views (copies for JAX, made when you look). `arrival.began` and `.ended` say
        when it travelled, in `time.perf_counter()` seconds. The stream's `layout` tells from the start what each step
        brings: per step `Rows` (source, ring, start, stop), as `arrivals` of the stream's `schedule` does for any rank.

        On a GPU transfers run on a stream beside the caller's, and the caller's waits for each arrival; no host does.
        There all ranks ask for steps, of several streams too, and make calls in between, in the same order.

        Memory: two steps' chunks, beside send. donate: send's memory is given away, undefined afterwards; where all
        shards are equal the stream then needs memory for one step more than send. It must be contiguous and writable,
        and may be donated on some ranks and not on others.

        Leaving the loop early ends it properly; `close()` does the same. Up to 7 streams may be open at once, opened
        in the same order on all ranks.
        """
        options = Options(algorithm, rings, extra=REVERSE if reverse else "", align=align, stretch=stretch)
        return open_gather(self._core, send, options, bool(donate))

    def reduce_scatter_steps(
        self,
        recv: Any,
        *,
        algorithm: str = "auto",
        rings: int | None = None,
        accumulate: bool = False,
        align: int = 1,
        stretch: float = STRETCH,
    ) -> ReduceStream:
        """The mirror image: each step asks for this rank's contribution to other ranks' sums, own chunks last.

            for request in comm.reduce_scatter_steps(grad):
                for chunk in request.chunks:
                    chunk.data[...] = contribution(chunk.source, chunk.start, chunk.stop)

        Step t asks for the chunks that `allgather_steps(reverse=True)`, with the same `align` and `stretch`, brings at
        step t+1. What is filled is added to what the ranks before gathered and travels on while the next is filled;
        recv, this rank's shard (its axis 0 may differ by rank), holds the sums after the loop. Fill all of `data`;
        what it holds before is undefined.

        accumulate: `data` holds what the ranks before added up (zeros at step 0): add your part to it, in place. Only
        bytes travel, so any dtype will do, and sums are as precise as recv's dtype and your additions. A step is
        handed over when that sum has come; the last one's data is recv itself, in use from the start. On rings only
        ("rings", "ring"; "auto" takes the better); the same on all ranks. Memory: two steps' chunks.

        `request.data`, `.began`, `.ended` (with accumulate) and `layout` are as in `allgather_steps`.
        """
        options = Options(algorithm, rings, extra=ACCUMULATE if accumulate else "", align=align, stretch=stretch)
        return open_reduce(self._core, recv, options)

    # --- what it takes

    def predicted_seconds(
        self, shard_bytes: int, algorithm: str = "auto", *, collective: str = "allgather"
    ) -> float | None:
        """What the cost model says that a collective with shards of so many bytes takes, the same on all ranks.

        algorithm: as in the collectives; "auto": the fastest. collective: "allgather", "reduce_scatter" or
        "allreduce". None if no topology was named, so that nothing is known of its links, or if the algorithm cannot
        run on it. No communication.
        """
        if algorithm not in ALGORITHMS:
            raise ArgumentError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
        if collective not in tuning.TUNED_COLLECTIVES:
            raise ArgumentError(f"collective must be one of {', '.join(tuning.TUNED_COLLECTIVES)}, got {collective!r}")
        if not is_integer(shard_bytes) or shard_bytes < 0:
            raise ArgumentError(f"shard_bytes must be an integer >= 0, got {shard_bytes!r}")
        if not self._core.situation.given:
            return None
        return seconds_of(Case(self.topology, collective, int(shard_bytes), costs=self._core.chooser.costs), algorithm)

    # --- upkeep

    def tune(self, sizes: Sequence[int] | None = None, *, repeats: int = 9) -> dict[str, list[tuple[int, str]]]:
        """Measure which algorithm is fastest here for each collective and size; `auto` then goes by that.

        sizes: bytes of a shard, default 1 KiB to 4 MiB in factors of 8. The table is kept under the user's cache
        directory (TASP_COLL_CACHE overrides) and read by later communicators on the same topology and hosts.
        Returns, per collective, (size, algorithm) pairs.
        """
        from tasp_coll.measure import measure

        chooser = replace(measure(self, sizes, repeats), costs=self._core.chooser.costs)
        path = tuning.cache_file(self._core.situation, self.transport)
        _spread(self._core, chooser)
        if self.rank == 0:
            try:
                tuning.write(path, chooser)
            except OSError as error:  # all ranks have the table
                warnings.warn(f"the tuned table cannot be kept for other runs: {error}", stacklevel=2)
        found: dict[str, list[tuple[int, str]]] = {}
        for collective, size, choice in self._core.chooser.table:
            found.setdefault(collective, []).append((size, choice.algorithm))
        return found

    def close(self) -> None:
        """Finish what is under way and free plans, staging memory and requests. Again: does nothing."""
        self._core.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._core.engine.interrupted(kind)
        self.close()

    def _call(self, kind: type[Collective], send: Any, recv: Any, options: Options, async_op: bool) -> Any:
        core = self._core
        if async_op:
            operation = kind(core, send, recv, options)
            operation.aside()
            return core.engine.submit(operation)
        # Arrays seen before need no second look: that is most of a small call's time.
        found = core.memos.take(kind, send, recv, options)
        if found is None:
            operation = kind(core, send, recv, options)
            result = core.engine.run(operation)
            core.memos.keep(operation, send, recv, options)
            return result
        found.operation.again(send, recv)
        result = core.engine.run(found.operation)
        core.memos.put_back(found)
        return result


def _plain(counts: Any) -> Any:
    """A tuple of ints where it is one in substance; else as it came, for the operation to refuse on all ranks."""
    try:
        return tuple(operator.index(rows) for rows in counts)
    except TypeError:
        return counts


def _join(transport: Transport, topology: Any, timeout: float, self_heal: bool, error: CollectiveError | None) -> Core:
    """The first agreement, and rank 0's tuned table and costs for all."""
    with_checksums = shares = False
    try:
        with_checksums, shares = checksums.wanted(), board.wanted()
    except ArgumentError as bad:
        error = error or bad
    given = topology is not None or bool(os.environ.get(ENVIRONMENT))
    found: Topology | None = None
    try:
        found = Topology.resolve(topology, transport.size)
    except CollectiveError as bad:
        error = error or bad
    healing: HealingTransport | None = None
    if self_heal and transport.size > 1:
        derived = None if found is None else derived_pairs(found)
        transport = healing = HealingTransport(transport, timeout, lanes(transport.size), derived)
    try:
        core = _meet(transport, timeout, bootstrap.Wishes(found, given, self_heal, with_checksums, shares, error))
    except CollectiveError:
        transport.close()
        raise
    if healing is not None:
        core.healer = Healer(healing, core.rounds, core.topology, core.adopt, lambda: bool(core.streams))
    return core


def _meet(transport: Transport, timeout: float, wishes: bootstrap.Wishes) -> Core:
    """Agree on what all wish for."""
    rounds, engine, found = Rounds(transport), Engine(transport, timeout), wishes.topology
    hosts = engine.run(bootstrap.Join(rounds, wishes))
    assert found is not None
    native = transport.name == "mpi" and not (wishes.self_heal or wishes.checksums)
    peer_memory = None
    if transport.name == "mpi" and transport.size > 1 and not wishes.self_heal:
        rounds, peer_memory = engine.run(bootstrap.Meet(rounds, wishes.shares, transport))
    different = len(set(hosts))
    situation = tuning.Situation(found, wishes.given, different, native, shared=different == 1)
    core = Core(transport, found, situation, rounds, engine)
    engine.farewell = rounds.leave
    core.checksums, core.peer_memory = wishes.checksums, peer_memory
    chooser = tuning.Chooser()
    if transport.rank == 0:
        measured = tuning.read(tuning.cache_file(situation, transport.name), found)
        chooser = replace(measured, costs=software_costs(hosts.count(hosts[0])))
    _spread(core, chooser)
    return core


def _spread(core: Core, table: tuning.Chooser) -> None:
    """Rank 0's table becomes everyone's."""
    core.chooser = tuning.Chooser.load(core.engine.run(bootstrap.Spread(core.rounds, table.dump())))
    core.memos.clear()
    core.graphs.clear()


def _register(comm: Communicator) -> None:
    if not _live:
        atexit.unregister(_leave)
        atexit.register(_leave)  # now, so that it runs before the transport's own
    _live.add(comm)


def _leave() -> None:
    """At exit: free what is idle; what is under way can no longer be waited for."""
    abandon_busy("the interpreter exited while it was busy")  # communicators that were dropped among them
    for comm in list(_live):
        comm.close()
