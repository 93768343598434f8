"""Tell what this machine has, what would stop a run, and what to do about it.

python tools/doctor.py
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import doctor_run
from doctor_checks import checks, verdict
from doctor_links import NoTopologyError, connections, gpus, topology
from doctor_report import text_of, write_json

EPILOG = """
Run it as one process, without mpirun: it starts two ranks itself, and sees whether they form one world. Each line is a
check, with one of these statuses, and below it what to do:
  ok           it is there and works
  MISSING      it is not there, and something that this machine could do does not work without it
  BROKEN       it is there, and does not work as it is
  not needed   it is not there, or not of use here: nothing is wrong; what the line below names would need it

What may crash or hang (MPI, CuPy, torch, NVML, namespaces) is looked at by processes of their own, all at once.

--save writes the NVLinks as a topology file: hand it to --topology of the bandwidth tests, to tools/show_plan.py, or to
all of your program's ranks in TASP_COLL_TOPOLOGY. Ranks are GPUs in CuPy's order; GPUs behind NVSwitch are joined by
one switch; the rates are NVIDIA's, not measured. It needs nvidia-ml-py.

--json writes {"tool", "version", "ready", "checks": [{"group", "name", "status", "found", "advice"}],
  "gpus": [{"index", "name", "memory_bytes", "pci"}],
  "links": [{"from", "to", "peer", "nvlinks", "version", "GBps"}]}: from each GPU to each other one, to "nvswitch0", and
  "elsewhere" for NVLinks to what is not one of these GPUs; peer, version and GBps (one way) are null where unknown.

exit status: 0 tools/all_gather_perf.py would run as the line "ready" says (NumPy and tasp_coll load, and the ranks of
  that mpiexec form one world; GPUs are not needed), 1 it would not, 2 wrong usage, or no topology to --save
"""
# As tasp_coll.bootstrap has them, which may not be there to be asked.
_LAUNCHED = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def seconds(text: str) -> float:
    """A number > 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds > 0, got {text!r}")
    return number


def output(text: str) -> Path:
    """A file that can be written."""
    path = Path(text)
    if os.path.isdir(path) or not os.access(path.absolute().parent, os.W_OK) or len(os.fsencode(path.name)) > 255:
        raise argparse.ArgumentTypeError(f"must be a file in a directory that can be written to, got {text!r}")
    return path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="doctor.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = command.add_argument
    add("--save", type=output, metavar="PATH", help="write the NVLinks as a topology file")
    add("--json", "-J", type=output, metavar="PATH", help="write the findings for programs too")
    add("--timeout", type=seconds, default=60.0, metavar="SECONDS", help="for each check, default: %(default)g")
    return command


def launched() -> int:
    """How many ranks a launcher says that it started, this process being one of them; 1 if there is none."""
    return max((int(size) for name in _LAUNCHED if (size := os.environ.get(name, "")).isdigit()), default=1)


def version() -> str | None:
    """tasp_coll's, if it can be loaded: it need not be, here of all places."""
    try:
        import tasp_coll
    except ImportError:
        return None
    return tasp_coll.__version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Wrong usage leaves by SystemExit(2)."""
    command = parser()
    asked = command.parse_args(argv)
    if (ranks := launched()) > 1:
        command.error(f"starts its own ranks, and is one of {ranks}: run it without mpirun")
    findings = doctor_run.look(asked.timeout)
    told, devices, links = checks(findings), gpus(findings), connections(findings)
    outcome = verdict(findings)
    width = shutil.get_terminal_size((120, 24)).columns
    print(text_of(told, devices, links, outcome, width), flush=True)
    if asked.json is not None:
        write_json(asked.json, version(), told, devices, links, outcome)
        print(f"written: {asked.json}")
    if asked.save is not None:
        try:
            topology(devices, links).save(asked.save)
        except (NoTopologyError, ImportError) as error:
            print(f"{command.prog}: --save: {error}, see the lines about links", file=sys.stderr)
            return 2
        print(f"written: {asked.save}")
    return 0 if outcome.ready else 1


if __name__ == "__main__":
    sys.exit(main())
