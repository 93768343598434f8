"""The proof of a schedule.

Proved for every schedule: each rank ends with every chunk it should have, each contribution counted exactly once in
a reduction; no chunk is sent before the step after it arrived, and none is written twice; no link carries more than
its capacity share in a step; the sends of one rank and the receives of its peer pair up in order.

Two ways lead there. *Replay* follows every chunk of every shard through every step, as msccl-tools do, vectorised
over the transfers of a step. *Structure* uses that the pattern is a rule: rings that are Hamiltonian cycles and turn
at one place a step deliver every chunk to every rank, so that checking the cycles and their links is enough; where
all ranks do the same, each relative to its own place, one stands for all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tasp_coll.errors import ArgumentError, ScheduleError
from tasp_coll.hamilton import is_hamiltonian_cycle
from tasp_coll.hierarchical import HierarchicalPattern
from tasp_coll.loads import chunk_units, step_load, user_of
from tasp_coll.patterns import (
    AllToAllPattern,
    ChainedPattern,
    DirectPattern,
    Pattern,
    ReversedPattern,
    RingPattern,
    Rows,
)
from tasp_coll.schedule import Schedule

REPLAY_CELLS = 1 << 21  # rank x origin x chunk flags up to which "auto" replays: n = 127 on all rings


def verify(schedule: Schedule, method: str = "auto") -> str:
    """The method that proved it; ScheduleError names step, rank, ring and chunk of the first fault.

    See `Schedule.verify`.
    """
    if method not in ("auto", "replay", "structure"):
        raise ArgumentError(f"method must be 'auto', 'replay' or 'structure', got {method!r}")
    kinds = set(schedule.weights)
    if sum(weight * schedule.weights.count(weight) for weight in kinds) != 1 or min(kinds) < 0:
        raise ScheduleError(f"the chunks' weights must be >= 0 and add up to 1, they are {schedule.weights}")
    small = schedule.ranks**2 * schedule.chunks <= REPLAY_CELLS
    if method == "structure" or (method == "auto" and not small and schedule.algorithm != "custom"):
        _by_structure(schedule)
        return "structure"
    _by_replay(schedule)
    return "replay"


# --- replay


def _by_replay(schedule: Schedule) -> None:
    _check_steps(schedule)
    if schedule.collective in ("allgather", "all_to_all"):
        _replay_gather(schedule, range(schedule.pattern.steps))
    else:
        reduced = reduction_steps(schedule)
        if schedule.collective == "allreduce":
            _replay_gather(schedule, range(reduced, schedule.pattern.steps))
    _check_pairs(schedule)


def _fault(schedule: Schedule, step: int, row: NDArray[np.int64], rule: str, receiver: bool = False) -> ScheduleError:
    src, dst, origin, chunk, ring = (int(value) for value in row)
    told = f"{rule} (rank {src} -> rank {dst}, chunk {chunk} of rank {origin}'s shard)"
    return ScheduleError(told, step=step, rank=dst if receiver else src, ring=ring, chunk=chunk)


def _check_steps(schedule: Schedule) -> None:
    """Chunks exist, a ring's link carries one chunk a step, and no link more than its capacity share."""
    unit, units = chunk_units(schedule)
    for step in range(schedule.pattern.steps):
        rows = schedule.pattern.transfers(step)
        if not len(rows):
            continue
        unknown = np.flatnonzero(rows[:, 3] >= schedule.chunks)
        if len(unknown):
            raise _fault(schedule, step, rows[unknown[0]], f"shards have only {schedule.chunks} chunks")
        twice = _first_repeat(rows[:, [0, 1, 4]])
        if twice is not None:
            raise _fault(schedule, step, rows[twice], "a ring carries more than one chunk over one link in one step")
        _check_capacity(schedule, step, rows, units[rows[:, 3]], unit)


def _check_capacity(schedule: Schedule, step: int, rows: Rows, amount: NDArray[np.int64], unit: int) -> None:
    load = step_load(schedule.topology, rows, amount)
    share = schedule.capacity_share
    worst = None if share is None else load.worst(float(share * unit))
    if worst is None:
        return
    u, v = load.link(worst)
    rule = f"link {u} -> {v} carries {load.load[worst]}/{unit} of a shard, its share is {share}"
    raise _fault(schedule, step, rows[user_of(schedule.topology, rows, (u, v))], rule)


def _codes(rows: Rows, bound: int) -> NDArray[np.int64]:
    """One number for each row of numbers below `bound`; rows compare as their numbers do."""
    code = rows[:, 0]
    for column in rows.T[1:]:
        code = code * bound + column
    return code


def _first_repeat(keys: Rows) -> int | None:
    """Index of a row that stands there a second time."""
    codes = _codes(keys, int(keys.max(initial=0)) + 1)
    ordered = np.sort(codes)
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    return int(np.flatnonzero(codes == ordered[same[0]])[1]) if len(same) else None


def _replay_gather(schedule: Schedule, steps: range) -> None:
    n = schedule.ranks
    have = np.zeros((n, n, schedule.chunks), dtype=bool)
    have[np.arange(n), np.arange(n)] = True
    for step in steps:
        rows = schedule.pattern.transfers(step)
        src, dst, origin, chunk, _ = rows.T
        early = np.flatnonzero(~have[src, origin, chunk])
        if len(early):
            raise _fault(schedule, step, rows[early[0]], "sent before it was received")
        again = np.flatnonzero(have[dst, origin, chunk])
        if len(again):
            raise _fault(schedule, step, rows[again[0]], "received although it is there already", receiver=True)
        twice = _first_repeat(rows[:, 1:4])
        if twice is not None:
            raise _fault(schedule, step, rows[twice], "received twice in one step", receiver=True)
        have[dst, origin, chunk] = True
    if schedule.collective == "all_to_all":
        lacking = np.argwhere(~have[np.arange(n), :, np.arange(n)])
        lacking = np.column_stack([lacking, lacking[:, :1]]) if len(lacking) else lacking
    else:
        lacking = np.argwhere(~have)
    if len(lacking):
        rank, origin, chunk = (int(value) for value in lacking[0])
        raise _unserved(schedule, rank, chunk, f"rank {rank} never receives chunk {chunk} of rank {origin}'s shard")


def _unserved(schedule: Schedule, rank: int, chunk: int, rule: str) -> ScheduleError:
    """The error for what is still missing after the last step; the ring is the one that carries such chunks."""
    rings = (rows[rows[:, 3] == chunk, 4] for rows in map(schedule.pattern.transfers, range(schedule.pattern.steps)))
    ring = next((int(found[0]) for found in rings if len(found)), None)
    return ScheduleError(rule, step=max(schedule.pattern.steps - 1, 0), rank=rank, ring=ring, chunk=chunk)


def reduction_steps(schedule: Schedule) -> int:
    """Replay until every owner has every contribution; the number of steps that took.

    held[rank, origin, chunk] counts the contributions in a rank's partial sum, 0 once it was sent on. Sums are only
    ever moved whole, so n contributions at the owner are each rank's exactly once.
    """
    n, steps = schedule.ranks, schedule.pattern.steps
    held = np.ones((n, n, schedule.chunks), dtype=np.int64)
    own = np.arange(n)
    for step in range(steps):
        if schedule.collective == "allreduce" and (held[own, own] == n).all():
            return step
        rows = schedule.pattern.transfers(step)
        src, dst, origin, chunk, _ = rows.T
        gone = np.flatnonzero(held[src, origin, chunk] == 0)
        if len(gone):
            raise _fault(schedule, step, rows[gone[0]], "a partial sum is sent a second time")
        twice = _first_repeat(rows[:, [0, 2, 3]])
        if twice is not None:
            raise _fault(schedule, step, rows[twice], "a partial sum is sent twice in one step")
        moved = held[src, origin, chunk].copy()
        held[src, origin, chunk] = 0
        late = np.flatnonzero(held[dst, origin, chunk] == 0)
        if len(late):
            raise _fault(schedule, step, rows[late[0]], "received after the rank sent its sum on", receiver=True)
        np.add.at(held, (dst, origin, chunk), moved)
    lacking = np.argwhere(held[own, own] != n)
    if len(lacking):
        owner, chunk = (int(value) for value in lacking[0])
        stuck = [rank for rank in range(n) if rank != owner and held[rank, owner, chunk]]
        rule = f"rank {owner} never receives the contributions held by ranks {stuck} to chunk {chunk} of its shard"
        raise _unserved(schedule, stuck[0] if stuck else owner, chunk, rule)
    return steps


def _check_pairs(schedule: Schedule) -> None:
    """Rank by rank programs: what a rank sends to a peer on a ring is, in order, what the peer expects."""
    ours, theirs = [], []
    for rank in range(schedule.ranks):
        sends, receives = schedule.pattern.moves(rank)
        ours.append(np.insert(sends, 1, rank, axis=1))
        theirs.append(np.insert(receives, 2, rank, axis=1))
    sent, expected = map(np.concatenate, (ours, theirs))
    bound = int(max(sent.max(initial=0), expected.max(initial=0))) + 1
    lanes = [1, 2, 5, 0]  # src, dst, ring, step: at most one message each
    sent, expected = (rows[np.argsort(_codes(rows[:, lanes], bound))] for rows in (sent, expected))
    shared = min(len(sent), len(expected))
    odd = np.flatnonzero((sent[:shared] != expected[:shared]).any(axis=1))
    if not len(odd) and len(sent) == len(expected):
        return
    longer = sent if len(sent) >= len(expected) else expected
    row = sent[odd[0]] if len(odd) else longer[shared]
    raise _fault(schedule, int(row[0]), row[1:], "a send and its receive do not pair up")


# --- structure


def _by_structure(schedule: Schedule) -> None:
    for pattern in _unfolded(schedule.pattern):
        if isinstance(pattern, RingPattern):
            _check_rings(schedule, pattern)
        elif isinstance(pattern, (DirectPattern, AllToAllPattern)):
            _check_direct(schedule, pattern)
        elif isinstance(pattern, HierarchicalPattern):
            _check_hierarchical(schedule, pattern)
        else:
            raise ScheduleError("a schedule of listed steps has no structure to argue from: use method='replay'")


def _unfolded(pattern: Pattern) -> list[Pattern]:
    """The rules a pattern is built from; reversal keeps every property that is checked here."""
    if isinstance(pattern, ChainedPattern):
        return [*_unfolded(pattern.first), *_unfolded(pattern.second)]
    return _unfolded(pattern.forward) if isinstance(pattern, ReversedPattern) else [pattern]


def _check_rings(schedule: Schedule, pattern: RingPattern) -> None:
    n = schedule.ranks
    if len(pattern.rings) != schedule.chunks:
        raise ScheduleError(f"{len(pattern.rings)} rings carry {schedule.chunks} chunks: one for each is needed")
    for number, ring in enumerate(pattern.rings):
        if not is_hamiltonian_cycle(ring, n):
            raise ScheduleError(f"the ring does not pass each of {n} ranks exactly once", ring=number, chunk=number)
    if n == 1:
        return
    # Every step uses the same links: the arcs of the rings, each with its ring's chunk.
    unit, units = chunk_units(schedule)
    rows = pattern.transfers(0)
    _check_capacity(schedule, 0, rows, units[rows[:, 3]], unit)


def _check_direct(schedule: Schedule, pattern: DirectPattern | AllToAllPattern) -> None:
    """The ranks' moves are rotations of rank 0's, so rank 0 stands for all."""
    n = schedule.ranks
    sends, receives = pattern.moves(0)
    peers = np.tile(np.arange(1, n), pattern.steps)
    pairs = ((sends, peers), (receives, (n - peers) % n))
    if any(not np.array_equal(rows[:, 1], expected) for rows, expected in pairs):
        raise ScheduleError("rank 0 does not exchange with each peer once a step", rank=0)
    if isinstance(pattern, DirectPattern) and pattern.steps and schedule.chunks != pattern.steps:
        raise ScheduleError(f"{pattern.steps} steps move {schedule.chunks} slices: one for each is needed")
    unit, units = chunk_units(schedule)
    if pattern.steps:
        rows = pattern.transfers(0)
        _check_capacity(schedule, 0, rows, units[rows[:, 3]], unit)


def _check_hierarchical(schedule: Schedule, pattern: HierarchicalPattern) -> None:
    """What ranks send differs by a rotation of nodes and of places in them, so the first rank stands for all."""
    if not np.array_equal(np.sort(pattern.grid, axis=None), np.arange(schedule.ranks)):
        raise ScheduleError(f"the nodes must hold each of {schedule.ranks} ranks once, they are {pattern.groups}")
    if pattern.slices != schedule.chunks:
        raise ScheduleError(f"{pattern.slices} slices move in {schedule.chunks} chunks: one for each is needed")
    rank = int(pattern.grid[0, 0])
    sends, receives = pattern.moves(rank)
    here = np.full((schedule.ranks, schedule.chunks), pattern.steps)
    here[rank] = -1
    here[receives[:, 2], receives[:, 3]] = receives[:, 0]
    if len(receives) != (schedule.ranks - 1) * schedule.chunks or (here == pattern.steps).any():
        raise ScheduleError(f"rank {rank} does not receive every chunk once", rank=rank)
    early = np.flatnonzero(here[sends[:, 2], sends[:, 3]] >= sends[:, 0])
    twice = _first_repeat(sends[:, [0, 1, 4]])
    if len(early) or twice is not None:
        step, peer, origin, chunk, ring = sends[early[0] if len(early) else twice].tolist()
        rule = "sent before it was received" if len(early) else "a ring carries more than one chunk over one link"
        raise _fault(schedule, step, np.array([rank, peer, origin, chunk, ring]), rule)
    unit, units = chunk_units(schedule)
    for step in pattern.kinds_of_steps():
        rows = pattern.transfers(step)
        _check_capacity(schedule, step, rows, units[rows[:, 3]], unit)
