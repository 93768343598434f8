"""Ranks that are silent, stopped, interrupted or gone: the others are told in time, and every job ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

MpiRun = Callable[..., CompletedProcess[str]]

# Every script begins with this; `watched` runs something that must end with a PeerTimeoutError about rank 1, in time.
PRELUDE = """
import os, signal, subprocess, sys, time
import numpy as np
from mpi4py import MPI
import tasp_coll

rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece

say("pid", os.getpid())

def watched(call, timeout, what, peers=(1,)):
    begun = time.monotonic()
    try:
        call()
    except tasp_coll.PeerTimeoutError as error:
        took = time.monotonic() - begun
        assert error.peers == peers, error
        assert took < timeout + 2, f"{what}: {took} s"
        say(f"timed out: {what}: {error}")
    else:
        sys.exit(f"{what}: no error")
"""


def run(
    mpirun: MpiRun, ranks: int, script: str, *arguments: object, limit_s: float = 60, env: dict[str, str] | None = None
) -> CompletedProcess[str]:
    """The script's job, which has left nothing running."""
    ended = mpirun(ranks, ["-c", PRELUDE + script, *map(str, arguments)], timeout=limit_s, env=env)
    deadline = time.monotonic() + 5
    for pid in re.findall(r"^pid (\d+)$", ended.stdout, re.MULTILINE):
        while _alive(int(pid)):
            assert time.monotonic() < deadline, f"process {pid} still runs\n{ended.stdout}{ended.stderr}"
            time.sleep(0.05)
    return ended


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


SILENT = """
timeout = 0.6
comms = {what: tasp_coll.Communicator(timeout=timeout) for what in sys.argv[1:]}
x = np.ones(40_000)
if rank == 1:
    time.sleep(600)
for what, comm in comms.items():
    if what == "steps":
        watched(lambda: next(comm.allgather_steps(x)), timeout, what)
    elif what == "wait":
        watched(comm.decomposed_allreduce(x, async_op=True).wait, timeout, what)
    elif what == "test":
        def poll(work=comm.decomposed_allreduce(x, async_op=True)):
            while not work.test():
                time.sleep(0.01)
            work.wait()
        watched(poll, timeout, what)
    elif what == "small":
        watched(lambda: comm.decomposed_allreduce(x[:3]), timeout, what)
    elif what == "accumulate":
        watched(lambda: sum(1 for _ in comm.reduce_scatter_steps(x, accumulate=True)), timeout, what)
    elif what == "donate":
        watched(lambda: sum(1 for _ in comm.allgather_steps(x, donate=True)), timeout, what)
    elif what == "stream":
        watched(lambda: sum(1 for _ in comm.reduce_scatter_steps(x)), timeout, what)
    else:
        watched(lambda: comm.decomposed_allgather(x, algorithm=what), timeout, what)
    try:
        comm.decomposed_allgather(x)
    except tasp_coll.CollectiveError as error:
        assert "cannot be used any more" in str(error), error
    else:
        sys.exit(f"{what}: still usable")
others = tuple(other for other in range(size) if other != rank)
watched(lambda: tasp_coll.Communicator(timeout=timeout), timeout, "Communicator", others)
sys.exit(3)
"""


def test_a_rank_that_never_calls_is_named(mpirun: MpiRun) -> None:
    """It sleeps; the job ends with the others' failure, not with its nap."""
    waits = ("rings", "native", "small", "steps", "stream", "accumulate", "donate", "wait", "test")
    ended = run(mpirun, 2, SILENT, *waits)
    assert ended.returncode != 0
    for what in (*waits, "Communicator"):
        found = re.search(f"^timed out: {what}: (.*)", ended.stdout, re.MULTILINE)
        assert found, ended.stdout + ended.stderr
        assert re.search(r"ranks? \[?1\b", found[1])


def test_only_the_silent_rank_is_named_among_many(mpirun: MpiRun) -> None:
    ended = run(mpirun, 4, SILENT, "rings", "wait")
    assert ended.returncode != 0
    assert ended.stdout.count("timed out: rings: ") == 3, ended.stdout + ended.stderr
    assert ended.stdout.count("timed out: wait: ") == 3, ended.stdout + ended.stderr


STOPPED = """
timeout, what = 0.7, sys.argv[1]
HELPER = '''
import os, signal, time
rank = os.getppid()
print("pid", os.getpid(), flush=True)
time.sleep(0.25)
os.kill(rank, signal.SIGSTOP)
until = time.monotonic() + 30
while os.getppid() == rank and time.monotonic() < until:
    time.sleep(0.05)
if os.getppid() == rank:
    os.kill(rank, signal.SIGKILL)
'''
comm = tasp_coll.Communicator(timeout=timeout)
x = np.ones(1_000_000)
into = np.empty(size * x.size)

def calls():
    while True:
        last[0] = time.monotonic()
        if what == "steps":
            for arrival in comm.allgather_steps(x):
                pass
        elif what == "async":
            works = [comm.decomposed_allreduce(x, async_op=True) for _ in range(3)]
            for work in works:
                work.wait()
        else:
            comm.decomposed_allgather(x, into, algorithm=what)

last = [0.0]
comm.decomposed_allgather(x[:3])
if rank == 1:
    subprocess.Popen([sys.executable, "-c", HELPER])
    calls()
try:
    calls()
except tasp_coll.PeerTimeoutError as error:
    took = time.monotonic() - last[0]
    assert error.peers == (1,), error
    assert took < timeout + 2, took
    say("timed out:", error)
    time.sleep(1)  # the job ends with the first that leaves
    raise
"""


@pytest.mark.parametrize("what", ["rings", "ring", "direct", "native", "steps", "async"])
def test_a_rank_that_stops_in_the_middle_is_named(mpirun: MpiRun, what: str) -> None:
    """The others leave with messages under way that nobody will ever take."""
    ended = run(mpirun, 3, STOPPED, what)
    assert ended.returncode != 0
    assert ended.stdout.count("timed out: ") == 2, ended.stdout + ended.stderr


LATE = """
comm = tasp_coll.Communicator(timeout=0.8)
x = np.ones(100_000)
if rank == 1:
    time.sleep(3)
    begun = time.monotonic()
    try:
        while True:
            comm.decomposed_allreduce(x)
    except tasp_coll.CollectiveError as error:
        assert time.monotonic() - begun < 2
        say("late:", error)
else:
    watched(lambda: comm.decomposed_allreduce(x), 0.8, "early")
    time.sleep(3)
"""


def test_a_rank_that_comes_too_late_hears_that_the_others_gave_up(mpirun: MpiRun) -> None:
    ended = run(mpirun, 3, LATE)
    assert ended.stdout.count("timed out: early") == 2, ended.stdout + ended.stderr
    assert re.search(r"late: .*gave up waiting", ended.stdout), ended.stdout + ended.stderr


# --- leaving


LEAVING = """
comm = tasp_coll.Communicator(timeout=20)
other = tasp_coll.Communicator(topology=f"nvswitch:{size}", timeout=20)
what = sys.argv[1]
for x in (np.ones(10), np.ones(30_000)):
    for algorithm in ("auto", "rings", "ring", "direct", "native"):
        comm.decomposed_allgather(x, algorithm=algorithm)
        other.decomposed_allreduce(x, algorithm=algorithm)
    if what != "plain":
        works = [comm.decomposed_allreduce(x, async_op=True) for _ in range(3)]
        works[-1].wait()
    if what == "streams":
        for arrival in comm.allgather_steps(x):
            break
        stream = other.allgather_steps(x)
        next(stream)
        stream.close()
    if what == "dropped":
        tasp_coll.Communicator(timeout=20).decomposed_allgather(x)
        tasp_coll.decomposed_allreduce(x)
    if what == "closed":
        comm.close()
        comm = tasp_coll.Communicator(timeout=20)
        work = comm.decomposed_allreduce(x, async_op=True)
        comm.close()
        assert work.wait()[0] == size
        comm = tasp_coll.Communicator(timeout=20)
say("end")
"""


@pytest.mark.parametrize("what", ["plain", "works", "streams", "dropped", "closed"])
def test_leaving_without_close_is_quiet(mpirun: MpiRun, what: str) -> None:
    ended = run(mpirun, 3, LEAVING, what)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.count("end\n") == 3


OUTSTANDING = """
comm = tasp_coll.Communicator(timeout=30)
x = np.ones(2_000_000)
if sys.argv[1] == "everyone" or (sys.argv[1] == "one" and rank == 0):
    work = comm.decomposed_allreduce(x, async_op=True)
if sys.argv[1] == "stream":
    stream = comm.allgather_steps(x)
    next(stream)
if sys.argv[1] == "dropped":
    work = tasp_coll.Communicator(timeout=30).decomposed_allreduce(x, async_op=True)
    comm = None
say("end")
"""


@pytest.mark.parametrize("what", ["everyone", "one", "dropped", "stream"])
def test_leaving_with_work_under_way_ends(mpirun: MpiRun, what: str) -> None:
    """Long before the timeout, and without a crash."""
    begun = time.monotonic()
    ended = run(mpirun, 3, OUTSTANDING, what)
    assert time.monotonic() - begun < 20
    assert ended.stdout.count("end\n") == 3
    assert not re.search("segmentation|corrupt|fatal|assert|signal 11", ended.stderr, re.IGNORECASE), ended.stderr


UNCAUGHT = """
comm = tasp_coll.Communicator(timeout=1)
if sys.argv[1] == "with":
    with comm:
        comm.decomposed_allreduce(np.ones(50_000))
        if rank == 1:
            raise ValueError("out of luck")
        comm.decomposed_allreduce(np.ones(50_000))
else:
    work = comm.decomposed_allreduce(np.ones(50_000), async_op=True)
    if rank == 1:
        raise ValueError("out of luck")
    work.wait()
    comm.decomposed_allgather(np.ones(3))
"""


@pytest.mark.parametrize("where", ["with", "outside"])
def test_an_uncaught_exception_on_one_rank_ends_the_job(mpirun: MpiRun, where: str) -> None:
    begun = time.monotonic()
    ended = run(mpirun, 3, UNCAUGHT, where)
    assert time.monotonic() - begun < 20
    assert ended.returncode != 0
    assert "out of luck" in ended.stderr


INTERRUPTED = """
def stop(number, frame):
    raise KeyboardInterrupt

comm = tasp_coll.Communicator(timeout=0.5)
x, what = np.ones(100_000), sys.argv[1]
comm.decomposed_allreduce(x)
if rank == 1:
    time.sleep(0.6)
else:
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
try:
    if what == "call":
        comm.decomposed_allreduce(x)
    elif what == "wait":
        comm.decomposed_allreduce(x, async_op=True).wait()
    elif what == "later":
        works = [comm.decomposed_allreduce(x, async_op=True) for _ in range(3)]
        works[-1].wait()
    else:
        for arrival in comm.allgather_steps(x):
            pass
    comm.decomposed_allreduce(x)
except KeyboardInterrupt:
    assert rank == 0
    say("interrupted")
    try:
        comm.decomposed_allreduce(x)
    except tasp_coll.CollectiveError as error:
        say("unusable:", error)
    time.sleep(1)
except tasp_coll.PeerTimeoutError as error:
    assert rank == 1, error
    say("told:", error)
"""


@pytest.mark.parametrize("what", ["call", "wait", "later", "steps"])
def test_an_interrupted_wait_leaves_the_communicator_unusable(mpirun: MpiRun, what: str) -> None:
    """What was under way cannot be taken back, so nothing may follow it."""
    ended = run(mpirun, 2, INTERRUPTED, what)
    printed = ended.stdout + ended.stderr
    assert "interrupted\n" in ended.stdout, printed
    assert re.search("unusable: .*cannot be used any more.*KeyboardInterrupt", ended.stdout), printed
    assert "told: " in ended.stdout, printed


# --- starting


def test_without_an_mpi_library_the_error_says_what_to_install() -> None:
    """Importing needs none."""
    script = (
        "import tasp_coll\ntry:\n    tasp_coll.Communicator()\nexcept tasp_coll.CollectiveError as e:\n    print(e)"
    )
    env = {**os.environ, "MPI4PY_LIBMPI": "/nonexistent/libmpi.so", "MPI4PY_MPIABI": "mpich"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    ended = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "install one" in ended.stdout
    assert "mpich" in ended.stdout


HUGE = """
rows = int(2.2 * 2**30)
comm = tasp_coll.Communicator(timeout=100)
send = np.zeros(rows if rank == 1 else 0, np.uint8)
if rank == 1:
    send[:1000] = np.arange(1000) % 251
    send[-1000:] = np.arange(1000) % 241
    send[2**31 - 500 : 2**31 + 500] = np.arange(1000) % 239
into = np.full(rows, 9, np.uint8)
for algorithm in ("ring", "direct"):
    assert comm.decomposed_allgatherv(send, into, algorithm=algorithm) is into
    assert np.array_equal(into[:1000], np.arange(1000) % 251)
    assert np.array_equal(into[-1000:], np.arange(1000) % 241)
    assert np.array_equal(into[2**31 - 500 : 2**31 + 500], np.arange(1000) % 239)
    ends = sum(int((np.arange(1000) % prime).sum()) for prime in (251, 241, 239))
    assert sum(int(into[at : at + 2**26].sum(dtype=np.uint64)) for at in range(0, rows, 2**26)) == ends
    into[:] = 9
say("end")
"""


def _available_gib() -> float:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) / 2**20 if found else 0.0


@pytest.mark.skipif(bool(os.environ.get("CI_SMALL")), reason="CI_SMALL is set")
def test_messages_beyond_2_gib(mpirun: MpiRun) -> None:
    if (available := _available_gib()) < 12:
        pytest.skip(f"needs 12 GiB of free memory, {available:.1f} GiB are there")
    ended = run(mpirun, 2, HUGE, limit_s=200)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("end\n") == 2


LATE_READ = """
from tasp_coll.transport.peer_memory import PeerMemory

timeout = 0.6
comm = tasp_coll.Communicator(timeout=timeout)
if comm._core.peer_memory is None:
    say("none")
    sys.exit()
send, recv = np.full(100_000, rank), np.empty((size, 100_000), np.int64)
for _ in range(3):
    comm.decomposed_allgather(send, recv, algorithm="direct")
read = PeerMemory.read
def late(*given):
    time.sleep(4)  # as if stopped
    PeerMemory.read = read
    return read(*given)
if rank == 1:
    PeerMemory.read = late
    try:
        comm.decomposed_allgather(send, recv, algorithm="direct")
        say("took", recv[:, 0])
    except tasp_coll.PeerTimeoutError as error:
        say("late:", error)
else:
    watched(lambda: comm.decomposed_allgather(send, recv, algorithm="direct"), timeout, "reads")
    recv[:] = -1
    time.sleep(4)
"""


def test_who_comes_late_to_what_others_gave_up_does_not_take_it_for_good(mpirun: MpiRun) -> None:
    """They have waited in vain for a rank to read their results, and have changed them when it comes."""
    ended = run(mpirun, 3, LATE_READ)
    if "none" in ended.stdout:
        pytest.skip("processes here cannot read each other's memory")
    assert ended.stdout.count("timed out: reads") == 2, ended.stdout + ended.stderr
    assert "late: decomposed_allgather: " in ended.stdout, ended.stdout + ended.stderr
