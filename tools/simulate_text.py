"""What simulate.py prints: tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from attention.forecast import Problem
from perf_report import figure
from simulate_model import Attention, Collective, Loss
from simulate_options import Fault, Options
from tasp_coll import Topology

Cells = Sequence[str]


def head(options: Options, topology: Topology) -> list[str]:
    """What is looked at."""
    device, costs = options.device, options.costs
    lines = [
        f"# {topology.name}: {topology.ranks} ranks, {len(topology.switches)} switches, {len(topology.links)} links"
    ]
    if options.link_share != 1:
        lines.append(f"# data gets {options.link_share:g} of the links' rates")
    if costs.message_us:
        lines.append(f"# software: {costs.message_us:g} us for each message and end")
    lines += [
        f"# computing: {device.flops / 1e12:g} TFLOP/s forward on long blocks, half of it with blocks of "
        f"{device.half:g} tokens,",
        f"# {device.step_s * 1e6:g} us a step, merging at {device.memory_GBps:g} GB/s; "
        f"a second of transfers costs {options.interference:g} s of it",
    ]
    return lines


def collectives(rows: Sequence[Collective]) -> list[str]:
    """Times of collectives, the one that `auto` takes with a star."""
    titles = ("collective", "per rank", "algorithm", "time", "algbw GB/s", "busbw GB/s", "over bound", "by")
    cells = [
        (
            *(row.collective, size(row.shard_bytes), row.algorithm + "*" * row.auto, time(row.seconds)),
            *(rate(row.algbw), rate(row.busbw), ratio(row.seconds, row.bound), row.method),
        )
        for row in rows
    ]
    return [*_table(titles, cells), "# * what auto takes"]


def attention(rows: Sequence[Attention]) -> list[str]:
    """Times of attention, the fastest with a star."""
    titles = ("tokens", "CCR", "method", "time", "compute", "links", "exposed", "over ring", "memory/rank")
    ring = {row.problem: row.estimate.seconds for row in rows if row.estimate.method == "ring"}
    cells = []
    for row in rows:
        found, before = row.estimate, ring.get(row.problem)
        compute, links = (sum(getattr(phase, name) for phase in found.phases) for name in ("compute_s", "links_s"))
        cells.append(
            (
                *(number(row.problem.tokens), "-" if row.ccr is None else f"{row.ccr:.3g}"),
                *(found.method + "*" * row.fastest, time(found.seconds), time(compute), time(links)),
                *(
                    time(sum(phase.exposed_s for phase in found.phases)),
                    ratio(before, found.seconds),
                    size(found.memory_bytes),
                ),
            )
        )
    return [f"# {shape(rows[0].problem)}", *_table(titles, cells), "# * the fastest that fits into --room"]


def losses(rows: Sequence[Loss], faults: Sequence[Fault]) -> list[str]:
    """What faults cost."""
    titles = ("collective", "per rank", "algorithm", "whole", "old plan", "loss", "new plan", "loss")
    cells = [
        (
            *(row.collective, size(row.shard_bytes), row.algorithm, time(row.healthy)),
            *(time(row.kept), _loss(row.kept, row.healthy), time(row.planned), _loss(row.planned, row.healthy)),
        )
        for row in rows
    ]
    return [f"# {', '.join(map(str, faults))}: what is lost of the rate", *_table(titles, cells)]


def shape(problem: Problem) -> str:
    """An attention in words."""
    kind = "causal" if problem.causal else "full"
    kind += "" if problem.window is None else f", window {problem.window}"
    both = ", forward and backward" if problem.backward else ", forward"
    heads = f"{problem.heads} heads on {problem.kv_heads} of keys, head_dim {problem.head_dim}"
    return f"batch {problem.batch}, {heads}, {problem.itemsize} bytes an element, {kind}{both}"


def _loss(after: float | None, before: float) -> str:
    return "-" if after is None else f"{100 * (1 - before / after):.1f}%"


def time(seconds: float | None) -> str:
    """In a readable unit."""
    if seconds is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.4g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(nbytes: float) -> str:
    """In a readable unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def number(count: int) -> str:
    """Tokens, as flags take them."""
    for unit, factor in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count % factor == 0:
            return f"{count // factor}{unit}"
    return str(count)


def rate(GBps: float) -> str:
    """GB/s."""
    return figure(GBps, 9)


def ratio(above: float | None, below: float) -> str:
    """One over the other."""
    return "-" if above is None or not below else f"{above / below:.3g}"


def _table(titles: Cells, rows: Sequence[Cells]) -> list[str]:
    widths = [max(len(row[at]) for row in (titles, *rows)) for at in range(len(titles))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (titles, *rows)]
    return [f"# {lines[0]}", *(f"  {line}" for line in lines[1:])]
