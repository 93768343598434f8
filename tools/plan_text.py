"""A plan in words and tables, made from the facts of `plan_view`."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import groupby

from plan_view import Move, View
from tasp_coll import Topology
from tasp_coll.links import Node

MANY_RANKS = 32  # above it rings are elided
FEW_RINGS = 4  # of those that are then shown
FEW_STOPS = 12  # ranks shown of each
MANY_MOVES = 40  # lines of the step table above which it is elided
FEW_MOVES = 8  # lines then shown of a step
MATRIX_RANKS = 8


def text_of(view: View, everything: bool = False) -> str:
    """The report for people; `everything`: nothing is elided."""
    parts = [_head(view), _rings(view, everything), _moves(view, everything), _loads(view), _times(view), _rivals(view)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def _head(view: View) -> list[str]:
    schedule, topology = view.schedule, view.topology
    switches = f"{_count(len(topology.switches), 'switch', 'es')}, " if topology.switches else ""
    rings = f"{_count(len(schedule.rings), 'ring')}, " if schedule.rings else ""
    lines = [
        f"topology  {topology.name}: {_count(topology.ranks, 'rank')}, {switches}{_links(topology)}",
        f"plan      {schedule.collective} by {schedule.algorithm}: {rings}{_count(view.steps, 'step')}, "
        f"every shard in {_count(schedule.chunks, 'chunk')}",
    ]
    if schedule.counts is not None:
        lines.append(f"rows      {', '.join(map(str, schedule.counts))}")
    how = {"replay": "every chunk followed through every step", "structure": "argued from its rule"}[view.proof]
    lines.append(f"proof     proved by {view.proof} ({how}) in {_seconds(view.proof_seconds)}")
    return lines


def _links(topology: Topology) -> str:
    if not topology.links:
        return "no links"
    if topology.is_full_mesh:
        return f"{_count(len(topology.links), 'link')} of {topology.links[0].GBps:g} GB/s"
    rates = sorted(Counter(link.GBps for link in topology.links).items(), reverse=True)
    many = _count(len(topology.links), "link")
    if len(rates) == 1:
        return f"{many} of {rates[0][0]:g} GB/s"
    if len(rates) > 4:
        return f"{many} of {rates[-1][0]:g} to {rates[0][0]:g} GB/s"
    return f"{many}: " + ", ".join(f"{number} of {rate:g} GB/s" for rate, number in rates)


def _rings(view: View, everything: bool) -> list[str]:
    rings = view.schedule.rings
    if not rings:
        return []
    elide = not everything and view.schedule.ranks > MANY_RANKS
    shown = rings[:FEW_RINGS] if elide else rings
    width = len(str(len(rings) - 1))
    backwards = ", sums against the arrows" if view.reduce_steps else ""
    lines = [f"rings, each with the share of a shard that travels on it{backwards}"]
    for number, ring in enumerate(shown):
        stops = [str(rank) for rank in ring.ranks]
        if elide:
            stops = [*stops[:FEW_STOPS], f"({len(stops) - FEW_STOPS} more)"]
        lines.append(f"  ring {number:{width}}  {ring.weight!s:>5}  {' -> '.join([*stops, str(ring.ranks[0])])}")
    if len(shown) < len(rings):
        lines.append(f"  and {_count(len(rings) - len(shown), 'more ring')}; --all shows them")
    return lines


def _moves(view: View, everything: bool) -> list[str]:
    """A line for each send and the receive beside it."""
    both = zip(view.sends, view.receives, strict=True)
    steps = [list(pairs) for _, pairs in groupby(both, lambda pair: pair[0].step)]
    if not steps:
        return [f"rank {view.rank} has everything: no steps"]
    short = not everything and len(view.sends) > MANY_MOVES
    left_out = len(steps) - 3 if short and len(steps) > 3 else 0
    shown = [*steps[:2], steps[-1]] if left_out else steps
    most = FEW_MOVES if short else len(view.sends)
    width = max(len(_told(view, send, "to")) for pairs in shown for send, _ in pairs[:most]) + 2
    on_rings = bool(view.schedule.rings)
    lines = [f"rank {view.rank} step by step", f"  step  {'ring  ' if on_rings else ''}{'sends':{width}}receives"]
    for pairs in shown:
        step = pairs[0][0].step
        if left_out and step == view.steps - 1:
            lines.append(f"   ...  {_count(left_out, 'more step')}; --all shows them")
        for index, (send, receive) in enumerate(pairs[:most]):
            ring = f"{send.ring:4}  " if on_rings else ""
            told = f"{_told(view, send, 'to'):{width}}{_told(view, receive, 'from')}"
            lines.append(f"  {'' if index else step:4}  {ring}{told}")
        if len(pairs) > most:
            lines.append(f"        {len(pairs) - most} more in this step")
    if view.reduce_steps:
        lines.append('  "sum c for r" is chunk c of the shard that ends at rank r, as added up so far')
    return lines


def _told(view: View, move: Move, way: str) -> str:
    kind = f"sum {move.chunk} for" if move.step < view.reduce_steps else f"chunk {move.chunk} of"
    return f"{kind} {move.origin} {way} {move.peer}"


def _loads(view: View) -> list[str]:
    links = len(view.topology.links)
    if not links:
        return []
    return [
        f"loads of the links, as shares of {'the largest' if view.schedule.counts else 'a'} shard",
        f"  {'':9}{'min':>11}{'mean':>11}{'max':>11}",
        f"  in a step{_spread(view, [link.step_max for link in view.loads.links])}",
        f"  in all   {_spread(view, [link.total for link in view.loads.links])}",
        f"  idle     {view.idle:11} of {_count(links, 'link')}",
        *(_matrix(view) if view.schedule.ranks <= MATRIX_RANKS else ()),
    ]


def _spread(view: View, amounts: list[int]) -> str:
    """Least, mean and most over all links, of which `amounts` are those that carry anything."""
    least = 0 if view.idle else min(amounts)
    mean = Fraction(sum(amounts), len(view.topology.links) * view.loads.unit)
    cells = view.share(least), mean, view.share(max(amounts, default=0))
    return "".join(f"{_share(cell):>11}" for cell in cells)


def _matrix(view: View) -> list[str]:
    """Each link's total."""
    nodes: list[Node] = [*range(view.schedule.ranks), *view.topology.switches]
    total = {(link.source, link.target): _share(view.share(link.total)) for link in view.loads.links}
    rows = [["", *map(str, nodes)]]
    for u in nodes:
        rows.append([str(u), *(total.get((u, v), "-" if view.topology.link(u, v) else "") for v in nodes)])
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ["".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return ["  in all, from row to column (-: an idle link, blank: no link)", *lines]


def _times(view: View) -> list[str]:
    bound = "known for equal shards only" if view.bound is None else _seconds(view.bound)
    if view.schedule.collective == "all_to_all":
        bound = "not known for all_to_all"
    whose = "the largest shard" if view.schedule.counts else "shards"
    alone = f"and {view.costs.message_us:g} us at each end of a message" if view.costs.message_us else "alone"
    link, used = view.prediction.link, view.prediction.utilisation
    busiest = "none" if link is None else f"{link[0]} -> {link[1]}, busy for {100 * used:.3g}% of that"
    return [
        f"time by the links {alone}, for {whose} of {_bytes(view.shard_bytes)}",
        f"  plan       {_seconds(view.prediction.seconds)}",
        f"  cut bound  {bound}",
        f"  ratio      {_ratio(view.ratio)}",
        f"  busiest    {busiest}",
    ]


def _rivals(view: View) -> list[str]:
    if not view.rivals:
        return []
    lines = [
        "all algorithms, predicted in the same way",
        f"  {'':12}  {'rings':>5}  {'slices':>6}  {'time':>9}  {'ratio':>6}",
    ]
    for rival in view.rivals:
        rings, slices = ("-" if number is None else number for number in (rival.rings, rival.choice.slices))
        seconds, ratio = _seconds(rival.prediction.seconds), _ratio(view.over_bound(rival.prediction))
        cells = f"{rival.choice.algorithm:12}  {rings:>5}  {slices:>6}  {seconds:>9}  {ratio:>6}"
        lines.append(f"  {cells}{'  <- auto' if rival.auto else ''}")
    return lines


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _share(share: Fraction) -> str:
    return str(share) if share.denominator < 1000 else f"{float(share):.4g}"


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} us"


def _bytes(number: float) -> str:
    for exponent, suffix in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if number >= 1024**exponent:
            return f"{number / 1024**exponent:.4g} {suffix}iB"
    return _count(int(number), "byte")
