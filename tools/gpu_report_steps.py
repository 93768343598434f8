"""What `gpu_report.py` runs: each step a command of its own, with a time limit, and where it writes its figures."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
_TAIL = 4000  # characters of what a step printed last
JSON = "{json}"  # in a command: where it is to write


@dataclass(frozen=True)
class Step:
    """A command, run from the repository's root. `name` is the same in every report."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    env: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """As a user would type it."""
        words = [word for word in self.command if word != JSON]
        words = [Path(word).name if word == sys.executable or word.endswith("mpiexec") else word for word in words]
        shown = " ".join(f"{name}={value}" for name, value in self.env.items())
        return f"{shown} {' '.join(words).removesuffix(' --json')}".strip()


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "ok", "failed", "timeout" or "skipped"."""

    status: str
    seconds: float
    tail: str


def carry_out(step: Step, path: Path, left_s: float) -> Outcome:
    """Run a step, for `left_s` seconds at most; nothing of it is left behind. path: what stands for JSON."""
    limit = min(step.limit_s, left_s)
    if limit < 1:
        return Outcome("skipped", 0.0, "no time was left")
    command = [str(path) if word == JSON else word for word in step.command]
    begun = time.monotonic()
    try:
        job = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1", **step.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return Outcome("failed", 0.0, str(error))
    try:
        printed, _ = job.communicate(timeout=limit)
        status = "ok" if job.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "timeout"
        os.killpg(job.pid, signal.SIGTERM)
        time.sleep(0.5)
        os.killpg(job.pid, signal.SIGKILL)
        printed, _ = job.communicate()
    return Outcome(status, time.monotonic() - begun, printed[-_TAIL:])


@cache
def mpiexec() -> tuple[str, ...]:
    """The launcher beside this Python, else the one on PATH, with what it needs for more ranks than cores."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise FileNotFoundError("no mpiexec beside this Python or on PATH: pip install 'tasp-coll[mpich]'")
    told = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60).stdout
    return (found, *(("--oversubscribe", "--allow-run-as-root") if "Open MPI" in told else ()))


def steps(gpus: int, ranks: Sequence[int]) -> list[Step]:
    """For a machine with so many GPUs. ranks: world sizes on the first GPU. What matters most comes first."""
    found = [tests("ipc", ranks[0]), tests("nccl", ranks[0])]
    found += [share(size) for size in ranks[:2]]
    found += [overhead(transport, graphs) for transport in ("nccl", "ipc") for graphs in (True, False)]
    found.append(loop())
    if gpus > 1:
        found += several(gpus)
    found += [Step("tests: killed rank", _pytest("survivors"), 60)]
    found += [tests(transport, size) for size in ranks[1:] for transport in ("ipc", "nccl")]
    found += [Step("tests: no graphs", _pytest("without_graphs"), 80)]
    return found


def tests(transport: str, ranks: int) -> Step:
    """tests/gpu on so many ranks."""
    return Step(f"tests: {transport}, {ranks} ranks", _pytest(f"suite_passes and {transport}-{ranks}"), 90)


def share(ranks: int) -> Step:
    """Of the GPU's copy bandwidth: ranks that share the first GPU, by CUDA IPC."""
    flags = "-b 64K -e 256M -f 8 --algo direct,rings,ring --gpu-transport ipc -n 10 -w 3 --out-of-place"
    return Step(f"share: {ranks} ranks", _perf(ranks, flags), 60, {"CUDA_VISIBLE_DEVICES": _first()})


def overhead(transport: str, graphs: bool) -> Step:
    """Host time of a small call of two ranks that share the first GPU."""
    flags = f"-b 16K -e 16K --algo rings,direct --gpu-transport {transport} -n 50 -w 10 --out-of-place"
    env = {"CUDA_VISIBLE_DEVICES": _first(), "TASP_COLL_CUDA_GRAPHS": str(int(graphs))}
    name = f"overhead: {transport}, {'graphs' if graphs else 'no graphs'}"
    return Step(name, _perf(2, flags), 40, env)


def loop() -> Step:
    """Attention's step loop beside its kernel."""
    command = (sys.executable, "tools/attention_steps_perf.py", "--local-tokens", "8K,32K", "--json", JSON)
    return Step("attention: step loop", command, 100)


def several(gpus: int) -> list[Step]:
    """A GPU for each rank: all algorithms by NCCL and by CUDA IPC, and attention's methods."""
    sizes = "-b 64K -e 1G -f 8 -n 10 -w 3 --out-of-place"
    found = [
        Step("busbw: nccl", _perf(gpus, f"{sizes} --algo rings,ring,direct,native --gpu-transport nccl"), 120),
        Step("busbw: ipc", _perf(gpus, f"{sizes} --algo rings,ring,direct --gpu-transport ipc"), 120),
    ]
    for causal in (False, True):
        flags = f"--device cuda -d bfloat16 --head-dim 128 --heads {8 * gpus} -s {32 * gpus}K --backward -n 5"
        words = (*flags.split(), *(["--causal"] if causal else []), "--json", JSON)
        name = f"attention: {'causal' if causal else 'full'}"
        found.append(Step(name, (*_launched(gpus), "tools/attention_perf.py", *words), 120))
    return found


def _perf(ranks: int, flags: str) -> tuple[str, ...]:
    return (*_launched(ranks), "tools/all_gather_perf.py", "--device", "cuda", *flags.split(), "--json", JSON)


def _launched(ranks: int) -> tuple[str, ...]:
    return (*mpiexec(), "-n", str(ranks), sys.executable)


def _pytest(selected: str) -> tuple[str, ...]:
    options = ("-q", "-rs", "-p", "no:cacheprovider", "-k", selected)
    return (sys.executable, "-m", "pytest", "tests/test_gpu.py", *options)


def _first() -> str:
    """Of the GPUs that this process may use."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
