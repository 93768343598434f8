"""Train at dynamic precision, beside float32 and equal precision, over several seeds: what it costs in accuracy and
what it saves in modelled cycles and energy. Under mpiexec data-parallel, with gradients that travel at few bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from perf_launch import agree, can_write, check_outputs, check_world, communicator, launch
from results_file import ResultsError
from train_dynasty_options import Options, parse
from train_dynasty_results import Outcome, read
from train_dynasty_tasks import TOOL, Task

if TYPE_CHECKING:
    from mpi4py import MPI

    from train_dynasty_data import DataSet
    from train_dynasty_ranks import Ranks
    from train_dynasty_report import Report

_PACKAGES = "pip install 'tasp-coll[dynasty,mpich]'"
_OF_LLAMA = "pip install 'tasp-coll[transformers,mpich]'"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Train, and leave with an exit status, the same on all ranks. argv: None for the process's own."""
    launch(TOOL, lambda quiet: parse(__doc__, argv, quiet=quiet), _train, _PACKAGES)


def _train(world: MPI.Intracomm, options: Options) -> int:
    check_world(world)
    check_outputs(world, {"--json": options.json, "--plot": options.plot})
    agree(world, _fault(world.size, options))
    done = _done(world, options)
    agree(world, _missing(options))
    data = _data(world, options)
    from train_dynasty_report import Report

    with _together(world, options) as ranks:
        asked = options.tasks(ranks.size)
        known = {outcome.key for outcome in done}
        left = [task for task in asked if (*task.row, task.seed) not in known]
        report = Report(options, ranks, data, asked, done)
        for outcome in _outcomes(options, left, data, ranks, report):
            report.add(outcome)
        report.end()
    return 0


def _outcomes(
    options: Options, tasks: Sequence[Task], data: DataSet, ranks: Ranks, report: Report
) -> Iterator[Outcome]:
    """Of all trainings, as they finish."""
    import train_dynasty_run

    if options.jobs == 1 or len(tasks) < 2:
        for task in tasks:
            yield train_dynasty_run.run(options, task, data, ranks, report.step)
        return
    with train_dynasty_run.workers(options.jobs) as pool:
        for future in as_completed([pool.submit(train_dynasty_run.run_alone, options, task) for task in tasks]):
            outcome = future.result()
            report.steps(outcome.steps)
            yield outcome


@contextmanager
def _together(world: MPI.Intracomm, options: Options) -> Iterator[Ranks]:
    """The ranks, with a communicator if there are several."""
    from train_dynasty_ranks import Ranks

    if world.size == 1:
        yield Ranks()
        return
    with communicator(options.topology, options.timeout) as comm:
        yield Ranks(world, comm)


def _data(world: MPI.Intracomm, options: Options) -> DataSet:
    import train_dynasty_run
    from train_dynasty_sets import DataError

    data: Any = None
    error = ""
    try:
        data = train_dynasty_run.load(options)
    except DataError as caught:
        error = str(caught)
    else:
        if not train_dynasty_run.steps_of(options, data):
            error = f"--batch must be at most the {len(data.train)} images to train on, got {options.batch}"
    agree(world, error)
    return data


def _done(world: MPI.Intracomm, options: Options) -> Sequence[Outcome]:
    """The runs that --resume takes over; the same on all ranks."""
    found: Sequence[Outcome] = ()
    error = ""
    if world.rank == 0 and options.resume and options.json is not None and options.json.exists():
        try:
            found = read(options.json, options.setting(world.size))
        except (OSError, ResultsError) as caught:
            error = f"--resume: {caught}"
    agree(world, error)
    return world.bcast(found)


def _fault(size: int, options: Options) -> str:
    """What cannot be done on so many ranks, or here."""
    if size > 1 and options.batch % size:
        return f"--batch must be a multiple of the {size} ranks, got {options.batch}"
    if size > 1 and (options.jobs > 1 or options.device != "cpu"):
        return "--jobs and --device cuda are for a single process: under mpiexec each rank is one, on a CPU"
    if size == 1 and options.grad_bits is not None:
        return "--grad-bits needs several ranks, between which gradients travel: mpiexec -n 4 python ..."
    place = options.checkpoint
    if place is not None and not (place.is_dir() and os.access(place, os.W_OK)) and not can_write(place):
        return f"--checkpoint must be a directory that can be written to, got {str(place)!r}"
    if place is not None and place.exists() and not place.is_dir():
        return f"--checkpoint must be a directory, got {str(place)!r}"
    return ""


def _missing(options: Options) -> str:
    """What takes seconds to import, and may not be there."""
    packages = _OF_LLAMA if options.model == "llama" else _PACKAGES
    try:
        import torch

        import dynasty  # noqa: F401

        if options.model == "llama":
            import transformers

            transformers.utils.logging.set_verbosity_error()
        if options.checkpoint is not None:
            packages = _OF_LLAMA
            import safetensors  # noqa: F401
    except ImportError as missing:
        return f"{missing}: {packages}"
    return "--device cuda: torch finds no GPU" if options.device == "cuda" and not torch.cuda.is_available() else ""


if __name__ == "__main__":
    main()
