"""The programs that look at one thing each, in a process of their own: what they load may crash or hang.

python doctor_probes.py NAME     prints what was found, one line of JSON

They need nothing but the standard library to start, so that they run where nothing is installed.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
_SMI_FIELDS = ("index", "name", "memory.total", "driver_version", "pci.bus_id")
_WORLD_TIMEOUT_S = 20.0


def imports() -> Facts:
    """What every tool loads first."""
    import numpy

    import tasp_coll

    return {"numpy": numpy.__version__, "tasp_coll": tasp_coll.__version__, "path": tasp_coll.__path__[0]}


def mpi() -> Facts:
    """The MPI library that mpi4py loads."""
    from mpi4py import MPI

    levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized"}
    return {
        "vendor": MPI.get_vendor()[0],
        "version": ".".join(map(str, MPI.get_vendor()[1])),
        "standard": ".".join(map(str, MPI.Get_version())),
        "thread_level": levels.get(MPI.Query_thread(), "multiple"),
        "path": _loaded("libmpi"),
    }


def world() -> Facts:
    """One rank of several: the world that it finds itself in, and whether a collective works there."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    facts: Facts = {"rank": comm.rank, "size": comm.size, "library": MPI.get_vendor()[0]}
    if comm.size > 1:
        import numpy as np

        import tasp_coll

        with tasp_coll.Communicator(timeout=_WORLD_TIMEOUT_S) as ours:
            gathered = ours.decomposed_allgather(np.array([comm.rank]))
        facts["gathered"] = gathered.tolist()
    return facts


def cupy() -> Facts:
    """CuPy's devices, who reaches whose memory, and its NCCL."""
    import cupy
    from cupy.cuda import runtime

    facts: Facts = {"version": cupy.__version__, "hip": bool(runtime.is_hip), "devices": [], "peers": []}
    facts["nccl"] = _nccl(_cupy_nccl)  # which loads without a GPU too
    try:
        facts["driver"], facts["runtime"] = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:  # no driver, or no device
        return {**facts, "fault": str(error)}
    for index in range(count):
        properties = runtime.getDeviceProperties(index)
        facts["devices"].append(
            {
                "name": properties["name"].decode(),
                "memory_bytes": properties["totalGlobalMem"],
                "pci": runtime.deviceGetPCIBusId(index),
                "capability": [properties["major"], properties["minor"]],
            }
        )
    facts["peers"] = [[a == b or bool(runtime.deviceCanAccessPeer(a, b)) for b in range(count)] for a in range(count)]
    return facts


def torch() -> Facts:
    """What torch was built for, its devices, and its NCCL."""
    import torch

    facts: Facts = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "nccl": None}
    if facts["cuda"] or facts["hip"]:
        facts["devices"] = torch.cuda.device_count()
        facts["nccl"] = _nccl(_torch_nccl)
    return facts


def smi() -> Facts:
    """What nvidia-smi tells: it comes with the driver."""
    if (path := shutil.which("nvidia-smi")) is None:
        return {"missing": "nvidia-smi"}
    query = [path, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return {"fault": said[-1] if said else f"{path} ended with status {done.returncode}"}
    rows = [dict(zip(_SMI_FIELDS, map(str.strip, row), strict=False)) for row in csv.reader(done.stdout.splitlines())]
    devices = [
        {"name": row["name"], "memory_bytes": _mebibytes(row["memory.total"]), "pci": row["pci.bus_id"]} for row in rows
    ]
    return {"driver": rows[0]["driver_version"] if rows else None, "devices": devices}


def nvml() -> Facts:
    """NVLinks as the driver's management library counts them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"fault": str(error)}
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    devices = []
    for handle in handles:
        links, inactive = _nvlinks(pynvml, handle)
        devices.append(
            {
                "name": pynvml.nvmlDeviceGetName(handle),
                "memory_bytes": _or_none(pynvml, lambda each: int(pynvml.nvmlDeviceGetMemoryInfo(each).total), handle),
                "pci": pynvml.nvmlDeviceGetPciInfo(handle).busId,
                "capability": list(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                "links": links,
                "inactive": inactive,
            }
        )
    return {"driver": pynvml.nvmlSystemGetDriverVersion(), "devices": devices}


def cluster() -> Facts:
    """Builds the parts of a virtual cluster with a switch, and takes them down again."""
    import vcluster_build
    import vcluster_job
    import vcluster_room
    from tasp_coll import Topology
    from vcluster_wiring import Settings, Wiring

    try:
        vcluster_job.mpiexec()
        with vcluster_room.opened() as (room, _):
            vcluster_build.check(room, Wiring(Topology.preset("nvswitch:2"), Settings(10, 4000)))
    except (vcluster_room.MissingError, vcluster_room.RoomError) as error:
        return {"fault": str(error)}
    return {"room": "in a user namespace" if room.user else "as root"}


PROBES: dict[str, Callable[[], Facts]] = {
    probe.__name__: probe for probe in (imports, mpi, world, cupy, torch, smi, nvml, cluster)
}


def _nvlinks(pynvml: Any, handle: Any) -> tuple[list[Facts], int]:
    """A GPU's active NVLinks, counted by version and what is at their other end; and how many are not active."""
    kinds = {
        pynvml.NVML_NVLINK_DEVICE_TYPE_GPU: "gpu",
        pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH: "switch",
        pynvml.NVML_NVLINK_DEVICE_TYPE_IBMNPU: "npu",
    }
    found: Counter[tuple[int | None, str, str | None]] = Counter()
    inactive = 0
    for number in range(pynvml.NVML_NVLINK_MAX_LINKS):
        state = _or_none(pynvml, pynvml.nvmlDeviceGetNvLinkState, handle, number)
        if state is None:  # the GPU has no link of this number
            continue
        if state != pynvml.NVML_FEATURE_ENABLED:
            inactive += 1
            continue
        version = _or_none(pynvml, pynvml.nvmlDeviceGetNvLinkVersion, handle, number)
        remote = _or_none(pynvml, pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, number)
        pci = _or_none(pynvml, pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, number)
        kind = kinds.get(remote, "unknown")
        # A switch is several chips, each with an address of its own: which chip does not matter.
        found[version, kind, pci.busId if pci is not None and kind != "switch" else None] += 1
    links = [
        {"version": version, "remote": kind, "pci": pci, "count": count}
        for (version, kind, pci), count in found.items()
    ]
    return links, inactive


def _or_none(pynvml: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers; None where it does not."""
    try:
        return ask(*arguments)
    except pynvml.NVMLError:
        return None


def _nccl(version: Callable[[], list[int]]) -> Facts:
    """NCCL's version, and the file that it was loaded from; None if it is part of another library."""
    try:
        return {"version": version(), "path": _loaded("libnccl") or _loaded("librccl")}
    except Exception as error:  # it is one part of many: the others are still worth telling
        return {"fault": f"{type(error).__name__}: {error}"}


def _cupy_nccl() -> list[int]:
    from cupy.cuda import nccl

    number = int(nccl.get_version())
    # NCCL_VERSION in nccl.h: X * 1000 + Y * 100 + Z up to 2.8, X * 10000 + Y * 100 + Z since.
    major, rest = divmod(number, 10000 if number >= 10000 else 1000)
    return [major, *divmod(rest, 100)]


def _torch_nccl() -> list[int]:
    import torch

    return [int(part) for part in torch.cuda.nccl.version()[:3]]


def _loaded(name: str) -> str | None:
    """The file of a shared library that this process has loaded."""
    paths = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    found = sorted(path for path in paths if os.path.basename(path).startswith(f"{name}.so"))
    return found[0] if found else None


def _mebibytes(text: str) -> int | None:
    """Bytes; None where nvidia-smi says [N/A], as for memory that GPU and CPU share."""
    return int(text) << 20 if text.isdecimal() else None


def main() -> None:
    """Run the probe of this name. What libraries print goes to stderr: stdout is for the answer."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    probe = PROBES[sys.argv[1]]
    try:
        facts = probe()
    except ModuleNotFoundError as error:
        facts = {"missing": f"no module {error.name}"}
    except RuntimeError as error:
        if "cannot load MPI library" not in str(error):  # as mpi4py says
            raise
        facts = {"missing": f"{' '.join(str(error).split())}"[:200]}
    with out:
        out.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
