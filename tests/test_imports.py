"""Who imports whom: the package loads without the libraries it can work with, and data flows one way."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tasp_coll"
HEAVY = ("mpi4py", "cupy", "torch", "jax", "ml_dtypes", "matplotlib", "ortools", "tqdm")

# The rooms in the order in which data flows through them. A module imports from its own room, as listed from left
# to right, and from rooms above. A new module needs a place here.
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": ("errors", "files", "forks"),
    "topology": ("links", "grids", "nodes", "cutbound", "topology", "presets", "topology_file", "discovery"),
    "decomposition": (
        *(
            "rings",
            "hamilton",
            "two_level",
            "torus",
            "hops",
            "widths",
            "single_ring",
            "ring_solver",
            "packing",
            "decomposition",
        ),
    ),
    "schedule": ("patterns", "hierarchical", "layouts", "schedule"),
    "verify": ("loads", "verify"),
    "simulate": (
        "simulate_links",
        "simulate_messages",
        "simulate_events",
        "simulate_native",
        "simulate",
        "simulate_formulas",
    ),
    "arrays": ("frameworks", "frameworks_gpu", "arrays", "reduction"),
    "transport": (
        *("transport", "transport.pool", "transport.loopback", "transport.mpi", "transport.torch"),
        *("transport.shared", "transport.peer_memory", "transport.stream_memory"),
    ),
    "links that heal": (
        *("transport.rates", "transport.frames", "transport.relay", "transport.doubts", "transport.boxes"),
        "transport.healing",
    ),
    "executor": (
        *("executor", "reading", "checksums", "launches", "programs", "slabs", "reduce_programs"),
        *("transport.nccl", "transport.ipc_plan", "transport.ipc"),
    ),
    "agreement": ("agreement", "board", "work", "engine"),
    "choice": ("forecast", "tuning", "measure"),
    "core": ("memos", "guard", "device", "graphs", "core"),
    "bootstrap": ("bootstrap", "linkup"),
    "healing": ("healing",),
    "collectives": (
        *("options", "gpu_graphs", "gpu_calls", "peer_reads", "operations", "collectives"),
        *("gpu_steps", "openings", "arrivals", "streams"),
    ),
    "communicator": ("communicator", "functions", "probe"),
    "torch back end": ("torch_forms", "torch_works", "torch_cuda", "torch_backend"),
}
ORDER = [module for room in ROOMS.values() for module in room]

# Against the order, inside functions only, each because a convenient name stands on the lower module.
BACKWARDS = {
    ("topology", "presets"): "Topology.preset(spec): presets build Topologies",
    ("topology", "topology_file"): "Topology.from_file and save: the file's format is apart from the value",
    ("topology", "probe"): "Topology.discover: measuring needs a communicator",
    ("schedule", "verify"): "Schedule.verify and phases: the proof reads schedules",
}

# Narrower than the order: all that these may know of the package.
ONLY: dict[str, set[str]] = {
    "errors": set(),
    "forks": {"errors"},
    "grids": set(),
    "nodes": {"links"},
    "cutbound": {"grids", "nodes"},
    "hamilton": {"errors"},
    "patterns": {"errors"},
    "frameworks": {"errors"},
    "reduction": {"errors"},
    "frameworks_gpu": {"frameworks"},
    "arrays": {"errors", "frameworks", "frameworks_gpu"},
    "transport": set(),
    "transport.loopback": {"errors", "transport", "transport.pool"},
    "transport.mpi": {"errors", "forks", "transport"},
    "transport.torch": {"errors", "forks", "transport", "transport.pool"},
    "transport.rates": set(),
    "transport.doubts": set(),
    "transport.frames": {"transport.rates"},
    "transport.relay": {"transport", "transport.frames"},
    "transport.shared": {"errors"},
    "transport.peer_memory": {"errors"},
    "transport.stream_memory": {"errors"},
    "transport.nccl": {"errors", "executor", "launches"},
    "transport.ipc_plan": {"errors", "executor", "launches"},
    "transport.ipc": {
        *("errors", "executor", "launches"),
        *("transport.ipc_plan", "transport.shared", "transport.stream_memory"),
    },
    "executor": {"transport"},
    "reading": {"transport.peer_memory"},
    "work": {"errors", "transport"},
    "engine": {"errors", "transport", "work"},
    "agreement": {"errors", "transport"},
    "memos": set(),
    "functions": {"communicator", "streams"},
    "torch_forms": set(),
    "torch_works": {"errors"},
    "torch_cuda": {"errors", "transport.nccl"},
    "torch_backend": {
        *("errors", "reduction", "topology"),
        *("torch_forms", "torch_works", "torch_cuda", "transport.torch"),
    },
}
LIBRARIES = {  # beside NumPy
    "transport.mpi": {"mpi4py"},
    "transport.torch": {"torch"},
    "transport.nccl": {"cupy"},
    "torch_forms": {"torch"},
    "torch_works": {"torch"},
    "torch_cuda": {"torch"},
    "torch_backend": {"torch"},
    "device": {"cupy"},
    "frameworks_gpu": {"cupy"},
    "arrays": {"cupy"},
    "bootstrap": {"mpi4py", "torch"},
    "ring_solver": {"ortools"},
}


class Import(NamedTuple):
    """`deferred`: inside a function. `library`: not of this package."""

    target: str
    deferred: bool
    library: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> list[Import]:
    """All imports of a module that are ever carried out, so those for type checkers alone are left out."""
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from found(alias.name, [], deferred)
        elif isinstance(node, ast.ImportFrom):
            above = [part for part in ("tasp_coll", *package.split(".")) if part]
            base = above[: len(above) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from found(name, [alias.name for alias in node.names], deferred)
        inner = deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inner)

    def found(name: str, members: list[str], deferred: bool) -> Iterator[Import]:
        top, _, rest = name.partition(".")
        if top != "tasp_coll":
            if top not in sys.stdlib_module_names:
                yield Import(top, deferred, True)
            return
        submodules = [".".join(filter(None, (rest, member))) for member in members]
        modules = [submodule for submodule in submodules if submodule in SOURCES]
        for target in modules or [rest]:
            if target:  # a name of the package itself, such as __version__, has no room
                yield Import(target, deferred, False)

    return list(walk(ast.parse(path.read_text(encoding="utf-8")), False))


def fresh(source: str) -> set[str]:
    """Modules that an interpreter of its own has loaded after `source`."""
    ended = subprocess.run(
        [sys.executable, "-c", f"{source}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return set(json.loads(ended.stdout.splitlines()[-1]))


def heavy(loaded: set[str]) -> set[str]:
    return {name for name in loaded if name.partition(".")[0] in HEAVY}


def test_importing_the_package_loads_next_to_nothing() -> None:
    loaded = fresh("import tasp_coll")
    assert not heavy(loaded)
    assert {name for name in loaded if name.startswith("tasp_coll")} == {"tasp_coll"}


def test_all_public_names_load_no_library() -> None:
    assert not heavy(fresh("import tasp_coll; [getattr(tasp_coll, name) for name in tasp_coll.__all__]"))


def test_no_module_but_the_transports_loads_a_library() -> None:
    with_library = ("transport.mpi", "transport.torch", *ROOMS["torch back end"])
    modules = [f"tasp_coll.{module}" for module in ORDER if module not in with_library]
    assert not heavy(fresh("\n".join(f"import {module}" for module in modules)))


def test_working_in_one_process_loads_no_library() -> None:
    source = """
import numpy, tasp_coll
from tasp_coll.transport.loopback import LoopbackWorld
def body(transport):
    with tasp_coll.Communicator(transport, timeout=20) as comm:
        comm.decomposed_allreduce(numpy.zeros(9000), algorithm="rings")
LoopbackWorld(3).run(body)
"""
    assert not heavy(fresh(source))


def test_every_module_has_a_room() -> None:
    assert sorted(["", *ORDER]) == sorted(SOURCES)


@pytest.mark.parametrize("module", ORDER)
def test_imports_follow_the_flow(module: str) -> None:
    for target, deferred, library in imports(module):
        if library:
            assert target in {"numpy"} | LIBRARIES.get(module, set())
        elif (module, target) in BACKWARDS:
            assert deferred, f"{target} may only be imported inside a function of {module}"
        else:
            assert ORDER.index(target) < ORDER.index(module), f"{module} stands above {target}"
            assert target in ONLY.get(module, set(ORDER))


def test_the_exceptions_are_in_use() -> None:
    used = {(module, target) for module in ORDER for target, _, library in imports(module) if not library}
    assert set(BACKWARDS) <= used


def test_launchers_are_touched_when_a_communicator_is_made_and_not_before() -> None:
    touched = ("mpi4py", "transport.mpi", "torch", "transport.torch")
    assert all(deferred for target, deferred, _ in imports("bootstrap") if target in touched)
    assert all(
        target != "transport.mpi" for module in ORDER if module != "bootstrap" for target, _, _ in imports(module)
    )
    for module, path in SOURCES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert "MPI" not in names or module in LIBRARIES


def test_the_package_itself_imports_lazily() -> None:
    assert imports("") == []
