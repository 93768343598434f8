"""The picture of a plan: its rings on a circle, and what arrives at one rank step by step."""

from __future__ import annotations

import colorsys
from math import cos, hypot, pi, sin
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Patch, Rectangle

from tasp_coll.files import writing
from tasp_coll.links import Node
from tasp_coll.topology import Topology

if TYPE_CHECKING:
    from plan_view import View

MANY_ARROWS = 60  # above it only a few rings are drawn
FEW_ARROWS = 48
ARROWED = 64  # ranks above which arrows are plain lines, and nodes have no numbers
MOST_LINKS = 2000  # physical links drawn at all
TEXT_CELLS = 32  # rows or columns above which cells have no text
TALLEST_CELL = 1.5  # height over width
MOST_CELLS = 64  # rows or columns drawn at all
SWITCH_RADIUS = 0.5
INK = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#555555")
Point = tuple[float, float]


def draw(view: View, path: Path) -> None:
    """Draw `view` to `path`, whose suffix is the format."""
    figure = Figure(figsize=(14, 7.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    drawn = _rings_drawn(view)
    _draw_circle(left, view, drawn)
    _draw_grid(right, view, drawn)
    figure.suptitle(_title(view), fontsize=15, fontweight="bold")
    with writing(path) as partial:
        figure.savefig(partial, dpi=110)


def _title(view: View) -> str:
    schedule = view.schedule
    told = f"{view.topology.name}: {schedule.collective} by {schedule.algorithm}"
    told += f", {view.steps} step{'' if view.steps == 1 else 's'}"
    if view.ratio is not None:
        told += ", at the cut bound" if view.ratio < 1.0005 else f", {view.ratio:.3g} times the cut bound"
    return told


# --- left: the rings


def _rings_drawn(view: View) -> int:
    """How many rings a reader can still tell apart."""
    rings, n = len(view.schedule.rings), view.schedule.ranks
    return rings if rings * n <= MANY_ARROWS else max(1, FEW_ARROWS // n)


def _draw_circle(axes: Any, view: View, drawn: int) -> None:
    topology = view.topology
    place = _places(topology)
    size = min(0.1, 1.2 / topology.ranks)
    if topology.switches or not view.schedule.rings:
        _draw_links(axes, topology, place)
    nodes = {node: _draw_node(axes, view, node, place[node], size) for node in place}
    arcs = [
        (INK[number % len(INK)], list(zip(ring.ranks, (*ring.ranks[1:], ring.ranks[0]), strict=True)))
        for number, ring in enumerate(view.schedule.rings[:drawn])
    ]
    if not arcs and view.steps:  # direct: what the chosen rank sends
        arcs = [(INK[0], sorted({(view.rank, move.peer) for move in view.sends}))]
    if topology.ranks > ARROWED:
        _draw_lines(axes, place, arcs)
    elif topology.ranks > 1:
        _draw_arrows(axes, place, nodes, arcs)
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
    axes.axis("off")
    told = _circle_title(view, drawn)
    if view.topology.switches:
        told += "; grey: the links"
    if view.schedule.rings and view.reduce_steps:
        told += "; sums go against the arrows"
    axes.set_title(told, fontsize=12)


def _circle_title(view: View, drawn: int) -> str:
    rings = len(view.schedule.rings)
    if not rings:
        return f"direct exchange: where rank {view.rank} sends"
    if drawn < rings:
        return f"the first {drawn} of {rings} rings" if drawn > 1 else f"the first of {rings} rings"
    return "one ring" if rings == 1 else f"{rings} rings"


def _places(topology: Topology) -> dict[Node, Point]:
    """Ranks on a circle, clockwise from the top; each switch towards its ranks, one for all in the middle."""
    n = topology.ranks
    place: dict[Node, Point] = {r: (sin(2 * pi * r / n), cos(2 * pi * r / n)) for r in range(n)}
    for switch in topology.switches:
        near = [place[link.source] for link in topology.links if link.target == switch and link.source in range(n)]
        x, y = (sum(x for x, _ in near), sum(y for _, y in near))
        far = hypot(x, y) / SWITCH_RADIUS
        place[switch] = (x / far, y / far) if far > 1e-6 else (0.0, 0.0)
    return place


def _draw_node(axes: Any, view: View, node: Node, at: Point, size: float) -> Patch:
    """A disc for a rank, in the colour of its shard, with a dark rim for the chosen one; a box for a switch."""
    x, y = at
    patch: Patch
    if isinstance(node, str):
        patch = Rectangle((x - 0.16, y - 0.06), 0.32, 0.12, facecolor="#eeeeee", edgecolor="#777777", zorder=3)
        axes.text(x, y, node, ha="center", va="center", fontsize=8, zorder=4)
    else:
        chosen = node == view.rank
        patch = Circle(
            at,
            size,
            facecolor=_pastel(view.schedule.ranks)[node],
            edgecolor="black" if chosen else "#777777",
            linewidth=2.5 if chosen else 1,
            zorder=3,
        )
        if view.schedule.ranks <= ARROWED:
            axes.text(x, y, str(node), ha="center", va="center", fontsize=min(13, 175 * size), zorder=4)
    axes.add_patch(patch)
    return patch


def _draw_links(axes: Any, topology: Topology, place: dict[Node, Point]) -> None:
    if len(topology.links) <= MOST_LINKS:
        for link in topology.links:
            ends = zip(place[link.source], place[link.target], strict=True)
            axes.plot(*ends, color="#d8d8d8", linewidth=1, zorder=0)


def _draw_lines(axes: Any, place: dict[Node, Point], arcs: list[tuple[str, list[tuple[int, int]]]]) -> None:
    for colour, pairs in arcs:
        for pair in pairs:
            axes.plot(*zip(*(place[rank] for rank in pair), strict=True), color=colour, linewidth=0.6, zorder=1)


def _draw_arrows(
    axes: Any, place: dict[Node, Point], nodes: dict[Node, Patch], arcs: list[tuple[str, list[tuple[int, int]]]]
) -> None:
    """Arrows bent to one side, so that the way back lies beside the way there, and a second one bent further.

    Where there is no way back they are straight.
    """
    one_way = not {(v, u) for _, pairs in arcs for u, v in pairs} & {pair for _, pairs in arcs for pair in pairs}
    drawn: dict[tuple[int, int], int] = {}
    thin = sum(len(pairs) for _, pairs in arcs) > 30
    for colour, pairs in arcs:
        for u, v in pairs:
            again = drawn[u, v] = drawn.get((u, v), -1) + 1
            (x, y), (p, q) = place[u], place[v]
            # How far the middle is off the straight line: as much for short arrows as for long ones.
            sag = 0.0 if one_way else 0.06 + 0.09 * again
            arrow = FancyArrowPatch(
                (x, y),
                (p, q),
                patchA=nodes[u],
                patchB=nodes[v],
                shrinkA=0,
                shrinkB=1,
                connectionstyle=f"arc3,rad={2 * sag / hypot(p - x, q - y)}",
                arrowstyle="-|>",
                mutation_scale=13 if thin else 18,
                linewidth=1.3 if thin else 2,
                color=colour,
                zorder=2,
            )
            axes.add_patch(arrow)


# --- right: the steps


def _draw_grid(axes: Any, view: View, drawn: int) -> None:
    """Rows are rings, or peers where there are none; columns are steps; a cell shows what arrives."""
    on_rings = bool(view.schedule.rings)
    keys = sorted({move.ring if on_rings else move.peer for move in view.receives})[:MOST_CELLS]
    columns = min(view.steps, MOST_CELLS)
    axes.set_title(_grid_title(view, len(keys), columns), fontsize=12)
    if not columns:
        axes.axis("off")
        return
    row_of = {key: row for row, key in enumerate(keys)}
    table = np.zeros((len(keys), columns), dtype=np.int64)
    for move in view.receives:
        row = row_of.get(move.ring if on_rings else move.peer)
        if row is not None and move.step < columns:
            table[row, move.step] = move.origin if on_rings else move.chunk
    shades = _pastel(view.schedule.ranks if on_rings else view.schedule.chunks)
    axes.pcolormesh(table, cmap=ListedColormap(shades), vmin=-0.5, vmax=len(shades) - 0.5, edgecolors="white")
    if max(table.shape) <= TEXT_CELLS:
        for (row, column), value in np.ndenumerate(table):
            size = max(6, min(14, 190 / max(table.shape)))
            axes.text(column + 0.5, row + 0.5, str(value), ha="center", va="center", fontsize=size)
    if 0 < view.reduce_steps < columns:
        axes.axvline(view.reduce_steps, color="black", linewidth=2)
    if len(keys) < columns:
        axes.set_box_aspect(min(0.88, TALLEST_CELL * len(keys) / columns))
    _label(axes, keys, columns, "ring" if on_rings else "from", drawn)


def _grid_title(view: View, rows: int, columns: int) -> str:
    what = "whose chunk" if view.schedule.rings else "which chunk"
    if view.reduce_steps:
        what = "whose sum" if view.schedule.rings else "which chunk's sum"
        what += " (left of the bar), then chunk," if view.reduce_steps < view.steps else ""
    told = f"{what} arrives at rank {view.rank}, step by step"
    every = len({move.ring if view.schedule.rings else move.peer for move in view.receives})
    limits = [f"{rows} of {every} rows"] if rows < every else []
    limits += [f"{columns} of {view.steps} steps"] if columns < view.steps else []
    return f"{told} ({', '.join(limits)})" if limits else told


def _label(axes: Any, keys: list[int], columns: int, name: str, drawn: int) -> None:
    """Every row and column its number, every fourth where they are many; a ring's in its colour."""
    for axis, count in ((axes.xaxis, columns), (axes.yaxis, len(keys))):
        every = 1 if count <= TEXT_CELLS else 4
        axis.set_ticks([index + 0.5 for index in range(0, count, every)])
    axes.set_xticklabels([str(step) for step in range(0, columns, 1 if columns <= TEXT_CELLS else 4)])
    axes.set_yticklabels([f"{name} {key}" for key in keys[:: 1 if len(keys) <= TEXT_CELLS else 4]])
    if name == "ring":
        for label, key in zip(axes.get_yticklabels(), keys, strict=False):
            if key < drawn:
                label.set(color=INK[key % len(INK)], fontweight="bold")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("step")


def _pastel(number: int) -> list[tuple[float, float, float]]:
    """`number` light colours that go round the colour circle."""
    return [colorsys.hsv_to_rgb(index / number, 0.35, 0.98) for index in range(number)]
