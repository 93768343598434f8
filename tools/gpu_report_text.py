"""`gpu_report.py`'s findings as Markdown, ready for a README: each table below its command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """All of a report."""
    machine = report["machine"]
    lines = [f"{machine['gpus']} x {machine['name']}, CuPy {machine['cupy']}, driver for CUDA {machine['driver']}", ""]
    lines += table(("step", "ended", "s"), [_status(name, each) for name, each in report["steps"].items()])
    for name, each in report["steps"].items():
        kind = next((kind for kind in _KINDS if name.startswith(kind)), None)
        if kind is not None and each["found"]:
            lines += ["", f"**{name}**: `{each['command']}`", "", *_KINDS[kind](each["found"])]
    return "\n".join(lines)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]


def _status(name: str, step: dict[str, Any]) -> tuple[str, str, str]:
    ended = step["status"]
    if ended in ("failed", "skipped"):
        told = step["tail"].strip().splitlines()
        ended = f"{ended}: {told[-1][:100]}" if told else ended
    elif name.startswith("tests") and " skipped" in step["tail"] and " passed" not in step["tail"]:
        ended = "all tests skipped"
    return name, ended, f"{step['seconds']:.0f}"


def _share(found: dict[str, Any]) -> list[str]:
    heads = ("size", "algorithm", "time (us)", "busbw (GB/s)", f"of {found['copy_GBps']:.0f} GB/s")
    rows = []
    for row in found["results"]:
        figures = (f"{row['time_us']['median']:.1f}", f"{row['busbw_GBps']:.1f}", f"{row['copy_share']:.2f}")
        rows.append((_bytes(row["size_bytes"]), row["algorithm"], *figures))
    return table(heads, rows)


def _overhead(found: dict[str, Any]) -> list[str]:
    heads = ("size", "algorithm", "host (us)", "time (us)")
    rows = [
        (_bytes(row["size_bytes"]), row["algorithm"], f"{row['host_us']:.1f}", f"{row['time_us']['median']:.1f}")
        for row in found["results"]
    ]
    return table(heads, rows)


def _busbw(found: dict[str, Any]) -> list[str]:
    """A row for each size, a column for each algorithm."""
    names = list(dict.fromkeys(row["algorithm"] for row in found["results"]))
    sizes = list(dict.fromkeys(row["size_bytes"] for row in found["results"]))
    cells = {(row["size_bytes"], row["algorithm"]): f"{row['busbw_GBps']:.1f}" for row in found["results"]}
    rows = [(_bytes(size), *(cells.get((size, name), "-") for name in names)) for size in sizes]
    return table(("size", *(f"{name} (GB/s)" for name in names)), rows)


def _loop(found: dict[str, Any]) -> list[str]:
    heads = ("local tokens", "mask", "kernel", "forward", "backward")
    rows = []
    for row in found["results"]:
        shares = (f"{row[part]['share']:.3f}" for part in ("forward", "backward"))
        rows.append((row["local_tokens"], "causal" if row["causal"] else "full", row["kernel"], *shares))
    return table(heads, rows)


def _methods(found: dict[str, Any]) -> list[str]:
    rows = [(row["method"], f"{row['time_us']['median'] / 1e3:.2f}") for row in found["results"]]
    return table(("method", "time (ms)"), rows)


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024 or size % 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} GiB"


_KINDS = {  # by how the step's name begins, the first that fits
    "share": _share,
    "overhead": _overhead,
    "busbw": _busbw,
    "attention: step loop": _loop,
    "attention": _methods,
}
