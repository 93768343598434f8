"""What valid input looks like, of each kind that is read: drawn at random, for `fuzz_mutate` to make wrong."""

from __future__ import annotations

from random import Random
from typing import Any

SPECS = ("full_mesh", "nvswitch", "mi300x", "dgx_h100", "cluster", "nvl72", "torus", "hypercube")
CHOICES = (
    *(("rings", None, None), ("rings", 1, None), ("rings", 2, None), ("ring", None, None)),
    *(("direct", None, None), ("direct", None, 1), ("native", None, None)),
)
RATES = (0.1, 0.25, 1, 1.0, 1.5, 3, 7.0, 64, 450.0)


def spec(rng: Random) -> str:
    """A preset's."""
    kind = rng.choice(SPECS)
    if kind == "mi300x":
        return kind
    small = [str(rng.choice((1, 2, 3, 4, 5, 8, 9))) for _ in range(3)]
    if kind == "cluster":
        return f"cluster:{small[0]}x{small[1]}{rng.choice(('', ':9', ':0.5', ':1.25'))}"
    if kind == "torus":
        return f"torus:{'x'.join(small[: rng.choice((2, 3))])}"
    return f"{kind}:{small[0]}"


def topology(rng: Random) -> dict[str, Any]:
    """What a topology file says: a ring through all nodes, so that it is connected, and any other links."""
    ranks = rng.randrange(1, 7)
    switches = [f"s{i}" for i in range(rng.randrange(3))]
    nodes: list[Any] = [*range(ranks), *switches]
    rng.shuffle(nodes)
    pairs = {(u, v) for u, v in zip(nodes, nodes[1:] + nodes[:1], strict=True) if u != v}
    pairs |= {(u, v) for u in nodes for v in nodes if u != v and rng.random() < 0.2}
    links = [{"from": u, "to": v, "GBps": rng.choice(RATES)} for u, v in sorted(pairs, key=str)]
    for link in links:
        if rng.random() < 0.3:
            link["latency_us"] = rng.choice((0, 0.5, 10))
        if rng.random() < 0.2 and (link["to"], link["from"]) not in pairs:
            link["duplex"] = True
    made: dict[str, Any] = {"ranks": ranks, "links": links}
    if switches or rng.random() < 0.3:
        made["switches"] = switches
    return made | ({"name": "box"} if rng.random() < 0.5 else {})


def tuned(rng: Random) -> dict[str, Any]:
    """A table of `Communicator.tune`."""
    sizes = [1 << at for at in sorted(rng.sample(range(30), rng.randrange(4)))]
    kinds = ("allgather", "reduce_scatter", "allreduce")
    table = [[rng.choice(kinds), size, *rng.choice(CHOICES)] for size in sizes]
    return {"version": 1, "table": table, "costs": {"message_us": 45.0, "ranks_per_core": 1.0}}


def result(rng: Random) -> dict[str, Any]:
    """What a bandwidth test or attention_perf.py writes with --json."""
    time = {"min": 1.0, "median": 2.0 + rng.random(), "max": 4.0}
    if rng.random() < 0.4:
        row = {"algorithm": "rings", "size_bytes": 4096, "time_us": time, "predicted_us": rng.choice((None, 2.1))}
        return {"tool": "all_gather_perf", "world_size": 8, "results": [row, {**row, "algorithm": "ring"}]}
    names = ["tasp", "ring", *(name for name in ("allgather", "ulysses") if rng.random() < 0.5)]
    rows = [
        {
            "method": name,
            "ccr": 0.4,
            "causal": rng.random() < 0.5,
            "ideal_us": 1.5,
            "time_us": time,
            "predicted_us": rng.choice((None, 2.0)),
        }
        for name in names
    ]
    return {"tool": "attention_perf", "world_size": rng.choice((2, 4, 8)), "results": rows}


def cluster(rng: Random) -> dict[str, Any]:
    """What the virtual cluster notes of itself. The processes are none that could be alive."""
    process = {"pid": 1 << 30, "started": rng.randrange(1000)}
    settings = {"link_mbit": 10.0, "mtu": 4000, "burst_ms": 5.0, "queue_ms": 50.0, "latency_scale": 1.0}
    return {
        "name": "c1",
        "spec": spec(rng),
        "settings": settings,
        "owner": rng.choice((None, process)),
        "room": rng.choice((None, process)),
        "user": rng.random() < 0.5,
    }


def condition(rng: Random) -> dict[str, Any]:
    """What it notes of a link's faults."""
    return {
        "down": rng.random() < 0.2,
        "slower": rng.choice((1.0, 4.0)),
        "lossy": rng.choice((0.0, 0.01)),
        "delayed_ms": rng.choice((0.0, 20.0)),
    }
