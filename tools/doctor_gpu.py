"""The checks of GPUs, of the NCCLs that are loaded for them, and of the links between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from doctor_links import Connection, NoTopologyError, connections, gpus, topology
from doctor_report import Check, Status
from doctor_run import Answer, Findings

CUPY = "pip install 'tasp-coll[cuda12]' or 'tasp-coll[cuda13]', for the driver's CUDA"


def gpu_checks(findings: Findings) -> Iterator[Check]:
    """Driver, devices, CuPy and the NCCLs. A machine without a GPU needs none of them."""
    devices = gpus(findings)
    yield _driver(findings["smi"], bool(devices))
    if devices:
        kinds = Counter(f"{each.name}, {_gib(each.memory_bytes)}" for each in devices)
        yield Check("GPU", "devices", "ok", "; ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    else:
        yield Check("GPU", "devices", "not needed", "none: arrays are in host memory")
    yield _cupy(findings["cupy"], bool(devices))
    yield from _nccls(findings["cupy"], findings["torch"], bool(devices))


def _driver(answer: Answer, needed: bool) -> Check:
    name = "nvidia-smi"
    if answer.wrong:
        return Check("GPU", name, "broken", answer.wrong, "install the NVIDIA driver that the kernel has loaded")
    if answer.missing:
        if needed:
            return Check("GPU", name, "missing", "not on PATH", "part of the NVIDIA driver; AMD has rocm-smi instead")
        return Check("GPU", name, "not needed", "not on PATH")
    return Check("GPU", name, "ok", f"driver {answer.facts['driver']}, {len(answer.facts['devices'])} GPUs")


def _cupy(answer: Answer, needed: bool) -> Check:
    if answer.missing or (answer.wrong and not needed):
        status: Status = "missing" if needed else "not needed"
        found = answer.missing or f"without a GPU: {answer.wrong}"
        return Check("GPU", "CuPy", status, found, f"for arrays on GPUs: {CUPY}" if needed else "")
    if answer.wrong:
        return Check("GPU", "CuPy", "broken", answer.wrong, f"CuPy must suit the driver and be there once: {CUPY}")
    facts = answer.facts
    kind = "ROCm" if facts["hip"] else "CUDA"
    told = f"{facts['version']}, {kind} runtime {_cuda(facts['runtime'])}, driver for {_cuda(facts['driver'])}"
    if facts["driver"] // 1000 < facts["runtime"] // 1000 and not facts["hip"]:
        return Check("GPU", "CuPy", "broken", told, "a newer driver, or the CuPy of the driver's CUDA")
    return Check("GPU", "CuPy", "ok", told)


def _nccls(cupy: Answer, torch: Answer, needed: bool) -> Iterator[Check]:
    """The NCCL that CuPy loads, the one that torch loads, and whether they are one."""
    versions = {}
    for name, answer, package in (("CuPy", cupy, "nvidia-nccl-cu12 (or -cu13)"), ("torch", torch, "a torch for CUDA")):
        nccl = answer.facts.get("nccl") or {}
        if nccl.get("version"):
            versions[name] = nccl["version"]
            path = nccl["path"] or "inside its own library"
            yield Check("GPU", f"NCCL of {name}", "ok", f"{'.'.join(map(str, nccl['version']))}, {path}")
        elif answer.wrong and needed:
            yield Check("GPU", f"NCCL of {name}", "broken", answer.wrong, f"{name} itself must load first")
        elif nccl:
            yield Check("GPU", f"NCCL of {name}", "broken", nccl["fault"], f"pip install {package}")
        elif needed and not answer.missing:
            yield Check("GPU", f"NCCL of {name}", "missing", "built without", f"pip install {package}")
        else:
            yield Check("GPU", f"NCCL of {name}", "not needed", "not loaded")
    if len(versions) == 2 and versions["CuPy"] != versions["torch"]:
        told = ", ".join(f"{name} has {'.'.join(map(str, version))}" for name, version in versions.items())
        advice = (
            "WARNING: in one process the first one loaded serves both: pip install the nvidia-nccl package of the "
            "version that torch asks for (pip show torch)"
        )
        yield Check("GPU", "one NCCL", "broken", told, advice)


def link_checks(findings: Findings) -> Iterator[Check]:
    """What joins the GPUs, of which there must be two."""
    devices = gpus(findings)
    if len(devices) < 2:
        for name in ("peer access", "NVLink", "topology"):
            yield Check("links", name, "not needed", "fewer than 2 GPUs")
        return
    links = connections(findings)
    pairs = [link for link in links if isinstance(link.target, int)]
    reached = [link for link in pairs if link.peer]
    if any(link.peer is None for link in pairs):
        yield Check("links", "peer access", "missing", "only CuPy can tell", CUPY)
    elif len(reached) < len(pairs):
        found = f"{len(reached)} of {len(pairs)} ordered pairs reach each other's memory"
        advice = "the others go through host memory: see nvidia-smi topo -p2p r, and the BIOS's IOMMU and ACS"
        yield Check("links", "peer access", "ok" if reached else "missing", found, advice)
    else:
        yield Check("links", "peer access", "ok", f"all {len(pairs)} ordered pairs")
    yield _nvlink(findings)
    try:
        made = topology(devices, links)
        bound = made.allgather_bound(1 << 20) * 1e3
        found = f"{made.name}: an all-gather of 1 MiB per rank takes {bound:.4g} ms at least"
        yield Check("links", "topology", "ok", found, "--save PATH writes it for --topology and TASP_COLL_TOPOLOGY")
    except (NoTopologyError, ImportError) as error:
        advice = "name a preset, or measure: mpirun -n N python tools/discover_topology.py --save PATH"
        yield Check("links", "topology", "missing", str(error), advice)


def _nvlink(findings: Findings) -> Check:
    answer = findings["nvml"]
    if answer.missing:
        return Check("links", "NVLink", "missing", answer.missing, "pip install nvidia-ml-py, which counts NVLinks")
    if answer.wrong:
        advice = "NVML is part of the NVIDIA driver: install it, or let the container see it"
        return Check("links", "NVLink", "broken", answer.wrong, advice)
    links = [link for link in connections(findings) if link.nvlinks]
    lost = sum(link.nvlinks for link in links if link.target == "elsewhere")
    inactive = sum(device["inactive"] for device in answer.facts["devices"])
    if not links:
        why = f", {inactive} inactive" if inactive else ""
        return Check("links", "NVLink", "not needed", f"none{why}: the GPUs talk over PCIe")
    kinds = sorted({_nvlinks(link) for link in links})
    told = f"per connection {', '.join(kinds)}"
    if lost or inactive:
        found = f"{told}; {inactive} inactive, {lost} to what is not one of these GPUs"
        return Check("links", "NVLink", "ok", found, "see nvidia-smi nvlink --status" if inactive else "")
    return Check("links", "NVLink", "ok", told)


def _gib(memory_bytes: int | None) -> str:
    return "memory unknown" if memory_bytes is None else f"{memory_bytes / 2**30:.4g} GiB"


def _nvlinks(link: Connection) -> str:
    rate = "rate unknown" if link.GBps is None else f"{link.GBps:g} GB/s each way"
    return f"{link.nvlinks} of version {link.version or 'unknown'} ({rate})"


def _cuda(number: int) -> str:
    """CUDA writes 12.4 as 12040."""
    return f"{number // 1000}.{number % 1000 // 10}"
