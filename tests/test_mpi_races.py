"""Threads, forks, exits and Ctrl-C at moments that nobody planned for."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

import launch
from loopback_ranks import on_ranks
from tasp_coll import CollectiveError, Communicator
from test_mpi_failures import run

MpiRun = Callable[..., CompletedProcess[str]]


def together(count: int, work: Callable[[], Any]) -> list[BaseException]:
    """The same work in so many threads at once; what they raised."""
    raised: list[BaseException] = []
    ready = threading.Barrier(count)

    def one() -> None:
        try:
            ready.wait(30)
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("rows", [3, 30_000])
def test_threads_are_served_one_after_another(rows: int) -> None:
    """Calls that look the same: which thread of one rank meets which of another does not matter."""

    def body(comm: Communicator) -> list[BaseException]:
        same, everyone = np.full(rows, comm.rank), np.repeat(np.arange(comm.size), rows)

        def work() -> None:
            for send in (same, same.copy(), same):  # one that all threads have, and one of their own
                assert (comm.decomposed_allgather(send) == everyone).all()
                assert (comm.decomposed_allgather(send, async_op=True).wait() == everyone).all()

        return together(4, work)

    assert on_ranks(3, body) == [[], [], []]


def test_close_waits_for_the_call_of_another_thread() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            time.sleep(0.3)
            comm.decomposed_allgather(np.ones(9000))
            return
        got: list[Any] = []
        caller = threading.Thread(target=lambda: got.append(comm.decomposed_allgather(np.ones(9000))))
        caller.start()
        time.sleep(0.1)
        comm.close()
        caller.join(10)
        assert got[0].sum() == 9000 * comm.size
        with pytest.raises(CollectiveError, match="closed"):
            comm.decomposed_allgather(np.ones(3))

    on_ranks(2, body)


THREADS = """
import threading
comm = tasp_coll.Communicator(timeout=20)
x = np.full(40_000, rank)
def work():
    for _ in range(20):
        assert (comm.decomposed_allgather(x)[:: x.size] == np.arange(size)).all()
        assert (comm.decomposed_allgather(x, async_op=True).wait()[:: x.size] == np.arange(size)).all()
        assert comm.decomposed_allgather(x[:2]).tolist() == np.repeat(np.arange(size), 2).tolist()
def alike():  # calls that look the same in all threads
    for _ in range(30):
        assert (comm.decomposed_allgather(x)[:: x.size] == np.arange(size)).all()
work()
threads = [threading.Thread(target=alike) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
work()
say("end")
"""


def test_threads_over_mpi(mpirun: MpiRun) -> None:
    ended = run(mpirun, 2, THREADS)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.count("end\n") == 2


FORKS = """
import multiprocessing, threading, warnings
warnings.simplefilter("ignore")  # newer Pythons say that forking a process with threads is bold
comm = tasp_coll.Communicator(timeout=20)
x = np.full(50_000, rank)
comm.decomposed_allgather(x, algorithm="rings")
stream = comm.allgather_steps(x)
next(stream)
work = comm.decomposed_allreduce(x, async_op=True)  # the background thread runs

def untouched():
    pass

def told(call):
    try:
        call()
    except tasp_coll.CollectiveError as error:
        assert "forked" in str(error), error
    else:
        raise AssertionError("no error")

def touched():
    told(lambda: comm.decomposed_allgather(x, algorithm="rings"))
    told(lambda: comm.decomposed_allgather(x, async_op=True))
    told(lambda: comm.allgather_steps(x))
    told(lambda: list(stream))
    assert work.test()  # with its result, or an error
    told(tasp_coll.Communicator)
    told(lambda: tasp_coll.decomposed_allgather(x))
    stream.close()
    comm.close()

def left():
    sys.exit(7)  # by multiprocessing's own way out

fork = multiprocessing.get_context("fork")
if rank == 1:
    for target, status in ((untouched, 0), (touched, 0), (left, 7)):
        child = fork.Process(target=target)
        child.start()
        child.join(30)
        assert child.exitcode == status, (target, child.exitcode)
    pid = os.fork()
    if not pid:
        sys.exit(0)  # by the interpreter's, which would wait in MPI for ever
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
assert work.wait()[0] == sum(range(size))
assert sum(1 for _ in stream) == size - 1
assert (comm.decomposed_allgather(x)[:: x.size] == np.arange(size)).all()
comm.close()
say("end")
"""


def test_forked_processes_are_refused_and_harm_nothing(mpirun: MpiRun) -> None:
    ended = run(mpirun, 2, FORKS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("end\n") == 2
    assert re.search(r"process \d+ was forked from a rank of MPI: end it with os._exit", ended.stderr)
    assert "Error" not in ended.stderr, ended.stderr


LEFT = """
import threading
comm = tasp_coll.Communicator(timeout=60)
x = np.ones(100_000)
comm.decomposed_allreduce(x)
what = sys.argv[1]

def waits():
    if what == "call":
        comm.decomposed_allreduce(x)
    elif what == "work":
        comm.decomposed_allreduce(x, async_op=True).wait()
    elif what == "stream":
        for arrival in comm.allgather_steps(x):
            pass

if rank == 0:
    threading.Thread(target=waits, daemon=True).start()
    time.sleep(0.3)
if what == "thread":
    quits = threading.Thread(target=lambda: (comm.decomposed_allreduce(x), sys.exit(3)))
    quits.start()
    quits.join()
    comm.decomposed_allreduce(x)
if what == "generator":
    def steps():
        with tasp_coll.Communicator(timeout=60) as own:
            for arrival in own.allgather_steps(x):
                yield arrival
    held = steps()
    next(held)
say("end")
"""


@pytest.mark.parametrize("what", ["call", "work", "stream", "thread", "generator"])
def test_the_interpreter_exits_in_any_state(mpirun: MpiRun, what: str) -> None:
    """A thread waits for peers that will never call, one has left by sys.exit, a generator is half consumed."""
    begun = time.monotonic()
    ended = run(mpirun, 2, LEFT, what)
    assert time.monotonic() - begun < 30, "long before the timeout"
    assert ended.stdout.count("end\n") == 2
    assert not re.search("segmentation|corrupt|fatal|assert|signal 11", ended.stderr, re.IGNORECASE), ended.stderr
    if what == "thread":
        assert ended.returncode == 0, ended.stderr


MISSING = """
if rank == 1:
    time.sleep(30)
    os._exit(0)
try:
    tasp_coll.Communicator(timeout=0.5)
except tasp_coll.PeerTimeoutError as error:
    say("timed out:", error)
"""


def test_a_communicator_that_was_never_made_does_not_hold_up_the_exit(mpirun: MpiRun) -> None:
    begun = time.monotonic()
    ended = run(mpirun, 2, MISSING)
    assert time.monotonic() - begun < 25
    assert ended.returncode != 0
    assert "timed out: Communicator: not all of ranks [1] made theirs" in ended.stdout


CAUGHT = """
import itertools, random
comm = tasp_coll.Communicator(timeout=1)
x = np.ones(30_000)
if rank == 1:  # Ctrl-C whenever it comes, also at odd ones
    import _thread, threading
    moment = random.Random(int(sys.argv[1])).uniform(0.01, 0.2)
    threading.Timer(moment, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    for turn in itertools.count():
        works = [comm.decomposed_allreduce(x, async_op=True) for _ in range(2)]
        for arrival in comm.allgather_steps(x):
            if arrival.step: break
        for work in works:
            while not work.test(): pass
            work.wait()
        comm.decomposed_allgather(x[:5])
except KeyboardInterrupt:
    say("interrupted")
except tasp_coll.CollectiveError as error:
    say("told" if rank != 1 or "KeyboardInterrupt" in str(error) else "wrong", error)
if not comm.usable:
    try:
        comm.decomposed_allgather(x)
    except tasp_coll.CollectiveError as error:
        assert "cannot be used any more" in str(error)
for work in works:
    until = time.monotonic() + 5
    while not work.test():
        assert time.monotonic() < until, "test() never says that it is over"
say("end")
"""


INSIDE = """
x = np.ones(30_000)
begun = 0.0
try:
    with tasp_coll.Communicator(timeout=30) as comm:
        with comm.allgather_steps(x) as stream:
            for arrival in stream:
                if rank == 1 and arrival.step == 1:
                    begun = time.monotonic()
                    raise KeyboardInterrupt
                comm.decomposed_allreduce(x)  # for which the other rank waits
except KeyboardInterrupt:
    assert time.monotonic() - begun < 10
    assert not comm.usable
    say("interrupted")
    os._exit(3)
"""


def test_an_interrupt_in_the_block_of_a_stream_waits_for_nobody(mpirun: MpiRun) -> None:
    """Though leaving it early in another way ends it properly, which takes the peers."""
    ended = run(mpirun, 2, INSIDE)
    assert ended.returncode != 0
    assert "interrupted" in ended.stdout, ended.stdout + ended.stderr


@pytest.mark.parametrize("seed", [1, 2])
def test_an_interrupt_at_any_moment_comes_out(mpirun: MpiRun, seed: int) -> None:
    ended = run(mpirun, 2, CAUGHT, seed)
    assert "interrupted\n" in ended.stdout or "told" in ended.stdout, ended.stdout + ended.stderr
    assert "wrong" not in ended.stdout
    assert "AssertionError" not in ended.stderr, ended.stderr
    assert ended.stdout.count("end\n") >= 1, ended.stdout + ended.stderr


def test_break_ranks_breaks_them() -> None:
    """tools/break_ranks.py does this at as many moments as one likes."""
    if launch.find_mpiexec() is None:
        pytest.skip("no mpiexec in this environment or on PATH: pip install 'tasp-coll[mpich]'")
    import break_ranks

    assert break_ranks.main(["--how", "stop,kill,interrupt", "-n", "1", "--timeout", "1.5", "--seed", "3"]) == 0
