"""Each parser: how its input is drawn, and what reading it does. An attempt says whether the input was taken (True) or
refused by a documented error (False); whatever else it raises is a finding."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from math import prod
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import attention_curve
import fuzz_checkpoint
import fuzz_cli
import fuzz_grammar
import fuzz_mutate
import model_check
import show_plan
import simulate
import vcluster_faults
import vcluster_registry
from tasp_coll import CollectiveError, Topology
from tasp_coll.bootstrap import timeout_seconds
from tasp_coll.topology import read_named
from tasp_coll.tuning import Chooser, Situation, cache_file
from tasp_coll.tuning import read as read_table
from vcluster_room import Room

SMALL = 12  # ranks up to which all that a topology can tell is asked for
_MESH = Topology.preset("full_mesh:4")


class Parser(NamedTuple):
    """make: draws an input. attempt: reads it, in a folder of its own."""

    make: Callable[[Random], Any]
    attempt: Callable[[Any, Path], bool]


class WrongResultError(Exception):
    """It was taken, and what came of it is wrong."""


def _spec(rng: Random) -> str:
    text = fuzz_grammar.spec(rng)
    if rng.random() < 0.1:
        return text
    changed = fuzz_mutate.text_of(rng, text)
    sizes = [int(number) for number in re.findall(r"\d{1,6}", changed)]
    slow = 300 < prod(sizes) * max(sizes, default=1) < 100_000_000  # up to seconds, so only now and then
    return text if slow and rng.random() < 0.9999 else changed


def _read_spec(text: str, folder: Path) -> bool:
    try:
        found = Topology.preset(text)
    except CollectiveError:
        return False
    return _asked(found)


def _asked(topology: Topology) -> bool:
    if topology.ranks <= SMALL:
        bound = topology.allgather_bound(1 << 20)
        if not 0 <= bound < float("inf") or (topology.ranks > 1) != (bound > 0):
            raise WrongResultError(f"bound {bound}")
        topology.path(0, topology.ranks - 1)
        hash(topology)
    return True


def _read_topology(data: bytes, folder: Path) -> bool:
    path, again = folder / "topology.json", folder / "again.json"
    path.write_bytes(data)
    try:
        found = read_named(path)
    except CollectiveError:
        return False
    found.save(again)
    if Topology.from_file(again) != found:
        raise WrongResultError("what was written is read back differently")
    return _asked(found)


def _read_cache(data: bytes, folder: Path) -> bool:
    path = folder / "tuned.json"
    path.write_bytes(data)
    found = read_table(path, _MESH)
    for collective, size, _ in found.table:
        found.choose(Situation(_MESH, True, 1, True), collective, size, False)
    if Chooser.load(found.dump()) != found:
        raise WrongResultError("what was written is read back differently")
    return found != Chooser()


def _environment(rng: Random) -> tuple[str, str]:
    name = rng.choice(("TOPOLOGY", "TIMEOUT", "TIMEOUT", "CACHE", "KERNEL", "CLUSTERS"))
    known = {
        "TOPOLOGY": (fuzz_grammar.spec(rng), "full_mesh:4", "/", "/dev/null", "/dev/zero", "x.json"),
        "TIMEOUT": ("600", "1.5", "1e3", "inf"),
        "KERNEL": ("cpu", "flash", "math"),
    }
    text = rng.choice(known.get(name, ("cache", "a/b", "/dev/null", "x" * 300)))
    if rng.random() < 0.7:
        text = fuzz_mutate.text_of(rng, text)
    if rng.random() < 0.1:
        text = os.fsdecode(fuzz_mutate.bytes_of(rng, os.fsencode(text.encode("utf-8", "replace"))))
    return f"TASP_COLL_{name}", text.replace("\0", "").replace("..", "")


def _read_environment(given: tuple[str, str], folder: Path) -> bool:
    name, text = given
    text = text.encode("utf-8", "surrogateescape" if _escaped(text) else "replace").decode("utf-8", "surrogateescape")
    with patch.dict(os.environ, {name: f"{folder}/e/{text}" if name.endswith(("CACHE", "CLUSTERS")) else text}):
        try:
            _READERS[name]()
        except CollectiveError:
            return False
        except OSError:  # of a place that cannot be written to: told by those that write there
            return not name.endswith(("CACHE", "CLUSTERS"))
        finally:
            shutil.rmtree(folder / "e", ignore_errors=True)
    return True


def _escaped(text: str) -> bool:
    return all(not 0xD800 <= ord(sign) <= 0xDFFF or 0xDC80 <= ord(sign) <= 0xDCFF for sign in text)


def _kernel() -> None:
    import torch

    from attention.kernels import kernel_for

    kernel_for(torch.zeros(1, 1, 1, 8))


_READERS: dict[str, Callable[[], object]] = {
    "TASP_COLL_TOPOLOGY": lambda: Topology.resolve(None, 4),
    "TASP_COLL_TIMEOUT": lambda: timeout_seconds(None),
    "TASP_COLL_CACHE": lambda: read_table(cache_file(Situation(_MESH, True, 1, True), "mpi"), _MESH),
    "TASP_COLL_KERNEL": _kernel,
    "TASP_COLL_CLUSTERS": vcluster_registry.directory,
}


def _read_result(data: bytes, folder: Path) -> bool:
    path = folder / "run.json"
    path.write_bytes(data)
    curve = _tool("attention_curve", lambda: attention_curve.main([str(path)]), (0, 2))
    checked = _tool("model_check", lambda: model_check.main(["--results", str(path)]), (0, 1, 2))
    return curve != 2 or checked != 2


def _tool(name: str, main: Callable[[], int], known: tuple[int, ...]) -> int:
    """Run a tool; its status. What it prints must be such as a terminal takes, and a refusal must say why."""
    out, told = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(told):
            status = main()
            out.flush()
    except SystemExit as left:
        fuzz_cli.check_refusal(name, left.code, told.getvalue())
        return 2
    if status not in known or (status == 2 and len(told.getvalue()) < len(name) + 8):
        raise WrongResultError(f"{name}.py ended with {status} and said {told.getvalue()!r}")
    return status


def _cluster(rng: Random) -> tuple[str, bytes]:
    if rng.random() < 0.5:
        return "fault", fuzz_mutate.file_of(rng, fuzz_grammar.condition)
    return "cluster", fuzz_mutate.file_of(rng, fuzz_grammar.cluster)


def _read_cluster(given: tuple[str, bytes], folder: Path) -> bool:
    kind, data = given
    if kind == "fault":
        path = folder / "fault.json"
        path.write_bytes(data)
        try:
            return bool(str(vcluster_faults.read_condition(path)))
        except CollectiveError:
            return False
    entry = folder / "clusters" / "c1" / "cluster.json"
    entry.parent.mkdir(parents=True, exist_ok=True)
    entry.write_bytes(data)
    # A file that names a process of this machine must not end it here.
    with patch.dict(os.environ, {"TASP_COLL_CLUSTERS": str(folder / "clusters")}), patch.object(Room, "destroy"):
        vcluster_registry.clusters()  # clears away what is no cluster any more
        return not entry.exists()


def _run(rng: Random) -> tuple[str, bytes, list[str]]:
    data = fuzz_mutate.spelled(rng, fuzz_grammar.topology(rng))
    if rng.random() < 0.6:
        data = fuzz_mutate.file_of(rng, fuzz_grammar.topology)
    if rng.random() < 0.5:
        sizes = rng.choice(("1", "1M", "1000G", "7"))
        algorithm = rng.choice(("rings", "ring", "direct", "hierarchical"))
        collective = rng.choice(("allgather", "reduce_scatter", "allreduce", "all_to_all"))
        return "show_plan", data, ["--algorithm", algorithm, "--collective", collective, "--shard-bytes", sizes]
    return (
        "simulate",
        data,
        ["-b", rng.choice(("1", "1M", "7,8G")), "-s", rng.choice(("16", "1M", "3K,5K")), "--dead", "0:1"],
    )


def _read_run(given: tuple[str, bytes, list[str]], folder: Path) -> bool:
    name, data, argv = given
    path, out = folder / "run.topology.json", folder / "run.out.json"
    path.write_bytes(data)
    if name == "show_plan":
        status = _tool(name, lambda: show_plan.main([str(path), *argv, "--json", str(out)]), (0,))
    else:
        status = _tool(name, lambda: simulate.main(["-t", str(path), *argv, "--json", str(out)]), (0, 2))
    if status == 0:
        json.loads(out.read_text(encoding="utf-8"), parse_constant=_no_constant)
    return status == 0


def _no_constant(name: str) -> None:
    raise WrongResultError(f"{name} in a file for programs")


PARSERS: dict[str, Parser] = {
    "spec": Parser(_spec, _read_spec),
    "topology": Parser(lambda rng: fuzz_mutate.file_of(rng, fuzz_grammar.topology), _read_topology),
    "cache": Parser(lambda rng: fuzz_mutate.file_of(rng, fuzz_grammar.tuned), _read_cache),
    "cli": Parser(fuzz_cli.command_line, lambda given, folder: fuzz_cli.parse(given)),
    "env": Parser(_environment, _read_environment),
    "results": Parser(lambda rng: fuzz_mutate.file_of(rng, fuzz_grammar.result), _read_result),
    "cluster": Parser(_cluster, _read_cluster),
    "checkpoint": Parser(fuzz_checkpoint.made, fuzz_checkpoint.attempt),
    "run": Parser(_run, _read_run),
}
