"""tools/doctor.py: what made-up machines mean, and what it says of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import doctor
import doctor_probes
import doctor_run
from doctor_checks import checks, verdict
from doctor_links import SWITCH, NoTopologyError, connections, gpus, matrix, topology
from doctor_report import Check, text_of
from doctor_run import RANKS, Answer, Findings, Launcher, ask
from launch import REPOSITORY, find_mpiexec
from tasp_coll import Topology
from tasp_coll.presets import H100_NVLINK

TOOL = REPOSITORY / "tools" / "doctor.py"
H100, A100 = ("NVIDIA H100 80GB HBM3", [9, 0]), ("NVIDIA A100-SXM4-80GB", [8, 0])
ALONE = Answer(({"missing": "no such thing"},))
IMPORTS = Answer(({"numpy": "2.4.6", "tasp_coll": "0.1.0", "path": "/src/tasp_coll"},))
LIBRARY = {
    "vendor": "MPICH",
    "version": "5.0.2",
    "standard": "5.0",
    "thread_level": "multiple",
    "path": "/lib/libmpi.so",
}
WORLD = Answer(tuple({"rank": r, "size": RANKS, "library": "MPICH", "gathered": [*range(RANKS)]} for r in range(RANKS)))
WORLDS = Answer(({"rank": 0, "size": 1, "library": "MPICH"},) * RANKS)
DEAD = Answer(fault="Runtime environment uses unsupported PMI version PMIx. Aborting.")
NO_GPU: dict[str, Answer] = dict.fromkeys(("cupy", "torch", "smi", "nvml"), ALONE)


def machine(launchers: tuple[Launcher, ...] | None = None, **answers: Answer) -> Findings:
    """One that is in order and has no GPU, but for the answers given."""
    said = {
        "imports": IMPORTS,
        "mpi": Answer((LIBRARY,)),
        "cluster": Answer(({"room": "as root"},)),
        **NO_GPU,
        **answers,
    }
    packages = dict.fromkeys(("tasp_coll", "numpy", "mpi4py"), ("1.0",))
    if launchers is None:
        launchers = (Launcher("/env/bin/mpiexec", "beside python", WORLD),)
    return Findings("3.12.1", "/env/bin/python", packages, said, launchers)


def pci(index: int, digits: int = 4) -> str:
    return f"{0:0{digits}x}:{0x1A + index:02X}:00.0"


def device(index: int, kind: tuple[str, list[int]] = A100) -> dict[str, Any]:
    """As CuPy tells it."""
    return {"name": kind[0], "memory_bytes": 80 << 30, "pci": pci(index), "capability": kind[1]}


def cupy(n: int, kind: tuple[str, list[int]] = A100, peer: bool = True, **more: Any) -> Answer:
    """A CuPy that sees `n` GPUs."""
    peers = [[a == b or peer for b in range(n)] for a in range(n)]
    nccl = {"version": [2, 27, 3], "path": "/env/libnccl.so.2"}
    facts = {"version": "13.6.0", "hip": False, "driver": 12080, "runtime": 12060, "peers": peers, "nccl": nccl}
    return Answer(({**facts, "devices": [device(index, kind) for index in range(n)], **more},))


def nvml(kind: tuple[str, list[int]], links: list[list[dict[str, Any]]], inactive: int = 0) -> Answer:
    """An NVML whose GPU number i has the NVLinks links[i]."""
    devices = [
        {**device(index, kind), "pci": pci(index, 8), "links": mine, "inactive": inactive}
        for index, mine in enumerate(links)
    ]
    return Answer(({"driver": "570.1", "devices": devices},))


def to_gpu(index: int, count: int, version: int | None = 5) -> dict[str, Any]:
    return {"version": version, "remote": "gpu", "pci": pci(index, 8), "count": count}


def to_switch(count: int, version: int = 6) -> dict[str, Any]:
    return {"version": version, "remote": "switch", "pci": None, "count": count}


def mesh(n: int, count: int) -> list[list[dict[str, Any]]]:
    """`count` NVLinks between every two GPUs."""
    return [[to_gpu(b, count) for b in range(n) if b != a] for a in range(n)]


def found(findings: Findings) -> dict[str, Check]:
    return {check.name: check for check in checks(findings)}


def made(findings: Findings) -> Topology:
    return topology(gpus(findings), connections(findings))


def printed(findings: Findings) -> str:
    told = checks(findings)
    return text_of(told, gpus(findings), connections(findings), verdict(findings), 120)


@pytest.mark.parametrize("version", [6, 7])
def test_gpus_behind_nvswitch_are_one_switch(version: int, tmp_path: Path) -> None:
    """Version 7 is 5.0, which some drivers answer for Hopper."""
    box = machine(cupy=cupy(8, H100), nvml=nvml(H100, [[to_switch(18, version)]] * 8))
    built = made(box)
    assert built == replace(Topology.preset("nvswitch:8"), name=built.name)
    assert built.is_single_switch
    assert {link.GBps for link in built.links} == {H100_NVLINK}
    built.save(tmp_path / "box.json")
    assert Topology.resolve(tmp_path / "box.json", 8) == built
    told = found(box)
    assert told["devices"].found == "8 x NVIDIA H100 80GB HBM3, 80 GiB"
    assert told["NVLink"].found == "per connection 18 of version 4.0 (450 GB/s each way)"
    assert (told["topology"].status, told["peer access"].status) == ("ok", "ok")
    assert printed(box).count("NV18") == 8


@pytest.mark.parametrize(("n", "count"), [(4, 4), (8, 1)])
def test_a_direct_mesh_is_a_full_mesh(n: int, count: int) -> None:
    built = made(machine(cupy=cupy(n), nvml=nvml(A100, mesh(n, count))))
    assert built.is_full_mesh
    assert {link.GBps for link in built.links} == {25.0 * count}
    assert (built.ranks, built.switches) == (n, ())


def test_without_nvlink_there_is_no_topology() -> None:
    box = machine(cupy=cupy(4, peer=False), nvml=nvml(A100, [[]] * 4, inactive=12))
    with pytest.raises(NoTopologyError, match="no NVLink is known"):
        made(box)
    told = found(box)
    assert told["NVLink"].found == "none, 48 inactive: the GPUs talk over PCIe"
    assert told["topology"].status == told["peer access"].status == "missing"
    assert "discover_topology.py" in told["topology"].advice
    assert matrix(gpus(box), connections(box))[1].split() == ["GPU0", "-", "no", "no", "no"]
    assert verdict(box).ready


def test_without_nvml_links_are_unknown() -> None:
    box = machine(cupy=cupy(2))
    assert found(box)["NVLink"].advice.startswith("pip install nvidia-ml-py")
    assert matrix(gpus(box), connections(box))[1].split() == ["GPU0", "-", "peer"]


def test_islands_are_no_topology() -> None:
    pairs = [[to_gpu(index ^ 1, 4)] for index in range(4)]
    with pytest.raises(NoTopologyError, match="NVLinks alone do not join the GPUs"):
        made(machine(cupy=cupy(4), nvml=nvml(A100, pairs)))


def test_an_unknown_version_has_no_rate() -> None:
    box = machine(cupy=cupy(2), nvml=nvml(A100, [[to_gpu(1, 2, 99)], [to_gpu(0, 2, None)]]))
    with pytest.raises(NoTopologyError, match="rate of NVLink None is not known"):
        made(box)
    assert found(box)["NVLink"].found == "per connection 2 of version unknown (rate unknown)"


def test_ranks_are_in_cupys_order() -> None:
    """A path 0-1-2 in NVML's order, which CuPy sees as 2, 0, 1; and a GPU that CuPy does not see."""
    path = [[to_gpu(1, 1)], [to_gpu(0, 1), to_gpu(2, 2)], [to_gpu(1, 2), to_gpu(3, 4)], [to_gpu(2, 4)]]
    seen = cupy(3, devices=[device(2), device(0), device(1)])
    box = machine(cupy=seen, nvml=nvml(A100, path))
    built = made(box)
    assert {(link.source, link.target): link.GBps for link in built.links} == {
        **dict.fromkeys(permutations((1, 2)), 25.0),
        **dict.fromkeys(permutations((2, 0)), 50.0),
    }
    assert [(link.source, link.nvlinks) for link in connections(box) if link.target == "elsewhere"] == [(0, 4)]
    assert "4 to what is not one of these GPUs" in found(box)["NVLink"].found


def test_nvlinks_are_counted_by_what_they_lead_to() -> None:
    """An NVML with two links to a GPU, two to chips of a switch, one that is off, and one that tells nothing."""

    class Error(Exception):
        pass

    remotes = [(0, "a"), (0, "a"), (2, "s0"), (2, "s1"), None, (None, None)]

    def link(number: int) -> tuple[int | None, str | None] | None:
        if number >= len(remotes):
            raise Error
        return remotes[number]

    def known(value: Any) -> Any:
        if value is None:
            raise Error
        return value

    library = SimpleNamespace(
        NVMLError=Error,
        NVML_NVLINK_MAX_LINKS=9,
        NVML_FEATURE_ENABLED=1,
        NVML_NVLINK_DEVICE_TYPE_GPU=0,
        NVML_NVLINK_DEVICE_TYPE_IBMNPU=1,
        NVML_NVLINK_DEVICE_TYPE_SWITCH=2,
        nvmlDeviceGetNvLinkState=lambda _, number: int(link(number) is not None),
        nvmlDeviceGetNvLinkVersion=lambda _, number: 6,
        nvmlDeviceGetNvLinkRemoteDeviceType=lambda _, number: known(remotes[number][0]),
        nvmlDeviceGetNvLinkRemotePciInfo=lambda _, number: SimpleNamespace(busId=known(remotes[number][1])),
    )
    links, inactive = doctor_probes._nvlinks(library, None)
    assert [(each["remote"], each["pci"], each["count"]) for each in links] == [
        ("gpu", "a", 2),
        ("switch", None, 2),
        ("unknown", None, 1),
    ]
    assert inactive == 1


def test_nvidias_library_has_what_is_asked_of_it() -> None:
    library = pytest.importorskip("pynvml")
    for name in ("DeviceGetNvLinkState", "DeviceGetNvLinkRemotePciInfo", "DeviceGetNvLinkRemoteDeviceType"):
        assert callable(getattr(library, f"nvml{name}"))
    assert library.NVML_NVLINK_VERSION_4_0 == 6


@pytest.mark.parametrize("torchs", [[2, 27, 3], [2, 21, 5]])
def test_nccls_that_differ_are_told(torchs: list[int]) -> None:
    nccl = {"version": torchs, "path": None}
    torch = Answer(({"version": "2.8", "cuda": "12.8", "hip": None, "devices": 2, "nccl": nccl},))
    told = found(machine(cupy=cupy(2), torch=torch))
    assert told["NCCL of torch"].found == f"{'.'.join(map(str, torchs))}, inside its own library"
    assert ("one NCCL" in told) == (torchs != [2, 27, 3])
    if warned := told.get("one NCCL"):
        assert (warned.status, warned.found) == ("broken", "CuPy has 2.27.3, torch has 2.21.5")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (ALONE, "missing"),
        (Answer(fault="ImportError: libcublas.so.12"), "broken"),
        (cupy(0, fault="cudaErrorInsufficientDriver"), "broken"),
        (cupy(2, driver=11080), "broken"),
        (cupy(2), "ok"),
    ],
)
def test_cupy_matters_where_there_are_gpus(answer: Answer, status: str) -> None:
    smi = Answer(({"driver": "570.1", "devices": [device(0), device(1)]},))
    assert found(machine(cupy=answer, smi=smi))["CuPy"].status == status
    if status != "ok" and not answer.facts.get("devices"):
        assert found(machine(cupy=answer))["CuPy"].status == "not needed"


def test_a_machine_without_gpus_is_in_order() -> None:
    box = machine()
    told = found(box)
    assert {check.status for name, check in told.items() if check.group in ("GPU", "links")} == {"not needed"}
    assert verdict(box).told == "/env/bin/mpiexec -n 2 /env/bin/python tools/all_gather_perf.py"
    assert printed(box).splitlines()[-1].startswith("ready: ")


@pytest.mark.parametrize(
    ("box", "name", "status", "advice"),
    [
        (machine(launchers=()), "mpiexec", "missing", "pip install 'tasp-coll[mpich]'"),
        (machine((Launcher("m", "beside python", WORLDS),)), "2 ranks", "broken", "not that of the MPICH"),
        (
            machine((Launcher("m", "on PATH", DEAD, (), "Open MPI"),)),
            "2 ranks, mpiexec on PATH",
            "broken",
            "not that of the MPICH",
        ),
        (machine((Launcher("m", "beside python", ALONE),)), "2 ranks", "missing", "pip install"),
        (machine((Launcher("m", "beside python", Answer(fault="no answer")),)), "2 ranks", "broken", "helloworld"),
        (machine((Launcher("m", "beside python", Answer(WORLD.said[:1])),)), "2 ranks", "broken", "pip install"),
        (machine(imports=Answer(fault="ended by SIGILL")), "loading", "broken", "--force-reinstall"),
        (machine(imports=ALONE), "loading", "missing", "pip install -e"),
    ],
)
def test_what_stops_a_run_is_told(box: Findings, name: str, status: str, advice: str) -> None:
    check = found(box)[name]
    assert check.status == status
    assert advice in check.advice
    assert not verdict(box).ready
    assert printed(box).splitlines()[-1].startswith("NOT ready: ")


def test_one_mpiexec_that_works_is_enough() -> None:
    """The classic: another MPI's mpiexec comes first on PATH."""
    box = machine((Launcher("/env/mpiexec", "beside python", WORLD), Launcher("/usr/mpiexec", "on PATH", WORLDS)))
    assert verdict(box).ready
    assert found(box)["2 ranks, mpiexec on PATH"].status == "broken"
    turned = replace(box, launchers=box.launchers[::-1])
    assert "/env/mpiexec" in verdict(turned).told


def test_two_cupys_are_one_too_many() -> None:
    box = machine()
    both = replace(box, packages={"cupy": ("cupy-cuda11x 13.0.0", "cupy-cuda12x 13.6.0")})
    assert found(both)["cupy"].status == "broken"


def test_probes_that_crash_or_hang_are_told() -> None:
    python = [sys.executable, "-I", "-S", "-c"]
    began = time.monotonic()
    answers = ask(
        [
            [*python, "import os; os.abort()"],
            [*python, "import sys; print('first', file=sys.stderr); raise ValueError('what it is')"],
            [*python, "import time; time.sleep(60)"],
            [*python, "print('noise'); print('{\"size\": 1}')"],
            [*python, "raise SystemExit(3)"],
            [*python, "import os; os.write(2, b'Fatal error\\nExit code: 16\\n-----\\n'); os.abort()"],
        ],
        timeout=2,
    )
    assert [answer.fault for answer in answers] == [
        "ended by SIGABRT",
        "ValueError: what it is",
        "no answer within 2 s (--timeout)",
        "",
        "ended with status 3",
        "Fatal error (ended by SIGABRT)",
    ]
    assert answers[3].facts == {"size": 1}
    assert time.monotonic() - began < 10


def run(*flags: str | Path, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """The tool, in a process of its own; it has 100 seconds on a machine that is busy with other things."""
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    command = [python, str(TOOL), *map(str, flags)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100)


@pytest.fixture
def bare(tmp_path: Path) -> tuple[str, str]:
    """A Python with no mpiexec beside it and nothing but NumPy and mpi4py, as its path and PYTHONPATH."""
    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("numpy", "mpi4py"):
        home = Path(pytest.importorskip(name).__file__).parent
        for part in home.parent.glob(f"{name}*"):
            (packages / part.name).symlink_to(part)
    return str(tmp_path / "env" / "bin" / "python"), f"{REPOSITORY}{os.pathsep}{packages}"


def library_here() -> str:
    """The file of the MPI library that mpi4py loads here."""
    answer = ask([[sys.executable, str(TOOL.with_name("doctor_probes.py")), "mpi"]], 60)[0]
    return str(answer.facts["path"])


@pytest.mark.skipif(find_mpiexec() is None, reason="no mpiexec in this environment or on PATH")
def test_this_machine_is_ready(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    ended = run("--json", path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.rstrip().splitlines()[-1] == f"written: {path}"
    record = json.loads(path.read_text())
    assert set(record) == {"tool", "version", "ready", "checks", "gpus", "links"}
    assert (record["tool"], record["version"], record["ready"]) == ("doctor", "0.1.0", True)
    told = {check["name"]: check for check in record["checks"]}
    assert all(set(check) == {"group", "name", "status", "found", "advice"} for check in record["checks"])
    world = next(check for name, check in told.items() if name.startswith("2 ranks"))
    assert (world["status"], world["group"]) == ("ok", "MPI")
    assert "one world of 2" in world["found"]
    assert {told[name]["status"] for name in ("numpy", "mpi4py", "library", "mpiexec")} == {"ok"}
    assert len(record["links"]) >= len(record["gpus"]) * (len(record["gpus"]) - 1)


def test_without_mpiexec_it_is_not(bare: tuple[str, str], tmp_path: Path) -> None:
    python, packages = bare
    path = tmp_path / "found.json"
    ended = run("--json", path, python=python, PYTHONPATH=packages, PATH="")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "NOT ready: no ranks can be started" in ended.stdout
    told = {check["name"]: check for check in json.loads(path.read_text())["checks"]}
    assert told["mpiexec"]["status"] == "missing"
    assert "pip install 'tasp-coll[mpich]'" in told["mpiexec"]["advice"]
    assert told["loading"]["status"] == "ok"


@pytest.mark.skipif(find_mpiexec() is None, reason="no MPI in this environment or on PATH")
def test_worlds_of_one_are_found(bare: tuple[str, str], tmp_path: Path) -> None:
    """An mpiexec that starts processes which know nothing of each other, as that of another MPI does."""
    python, packages = bare
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text('#!/bin/sh\ntest "$1" = -n || exit\nshift 2\n"$@" & "$@"\nwait\n')
    mpiexec.chmod(0o755)
    there = f"{tmp_path}{os.pathsep}{os.defpath}"
    path = tmp_path / "found.json"
    ended = run("-J", path, python=python, PYTHONPATH=packages, PATH=there, MPI4PY_LIBMPI=library_here())
    assert ended.returncode == 1, ended.stdout + ended.stderr
    world = next(check for check in json.loads(path.read_text())["checks"] if check["name"].startswith("2 ranks"))
    assert (world["status"], world["found"]) == ("broken", f"{mpiexec}: 2 worlds of one rank each")
    assert "not that of the" in world["advice"]


def test_where_nothing_is_installed_it_says_so(bare: tuple[str, str], tmp_path: Path) -> None:
    ended = run(python=bare[0], PYTHONPATH="", PATH=str(tmp_path))
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "pip install -e '.[mpich]'" in ended.stdout
    assert not ended.stderr


def test_no_topology_is_saved_where_there_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    box = machine(cupy=cupy(2), nvml=nvml(A100, [[]] * 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor_run, "look", lambda timeout: box)
        assert doctor.main(["--save", str(tmp_path / "box.json")]) == 2
        assert "--save: no NVLink is known between the GPUs" in capsys.readouterr().err
        patch.setattr(doctor_run, "look", lambda timeout: machine(cupy=cupy(2), nvml=nvml(A100, mesh(2, 12))))
        assert doctor.main(["--save", str(tmp_path / "box.json")]) == 0
    assert Topology.from_file(tmp_path / "box.json").GBps(0, 1) == 300
    assert SWITCH not in (tmp_path / "box.json").read_text()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--json", "/no/such/place/x.json"],
            "argument --json/-J: must be a file in a directory that can be written to",
        ),
        (["--save", "."], "argument --save: must be a file in a directory that can be written to, got '.'"),
        (["--timeout", "0"], "argument --timeout: must be a number of seconds > 0, got '0'"),
    ],
)
def test_wrong_usage_is_told(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        doctor.main(flags)
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


def test_under_mpirun_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(SystemExit) as exit_:
        doctor.main([])
    assert exit_.value.code == 2
    assert "is one of 4: run it without mpirun" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        doctor.main(["--help"])
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("MISSING", "BROKEN", "not needed", "exit status", "TASP_COLL_TOPOLOGY"))
