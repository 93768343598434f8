"""Carries out the drawn calls on a communicator, and compares every element of what comes back."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np

import tasp_coll
from perf_data import NDArray
from soak_calls import GATHERS, STREAMS, Call, Numbers, array_of, bits_of, contiguous, spoilt

_BESIDE = 1000  # elements of the sums that are made while a stream is open
_BURST = 3  # asynchronous calls under way together, and calls with the same arrays one after another


class Runner:
    """One call on one communicator. `fault` says what is wrong, if anything."""

    def __init__(self, comm: tasp_coll.Communicator, colour: int, seed: int, call: Call) -> None:
        self.comm, self.colour, self.seed, self.call = comm, colour, seed, call
        self.rng = random.Random(f"{seed}/{call.number}/run")
        self.fault = ""

    def run(self) -> str:
        """Make the call; what is wrong."""
        form = self.call.form
        if form == "wrong":
            self._disagree()
        elif self.call.kind == "allgather_steps":
            self._gather_steps()
        elif self.call.kind == "reduce_scatter_steps":
            self._reduce_steps()
        elif form == "async":
            self._together()
        elif form == "again":
            self._again()
        else:
            numbers = self._numbers()
            send, recv = self._arrays(numbers)
            self._check(self._collective(send, recv), recv, numbers)
        return self.fault

    def _numbers(self, salt: int = 0) -> Numbers:
        return Numbers(self.seed, self.call, self.comm.size, self.colour, salt)

    def _say(self, fault: str) -> None:
        self.fault = self.fault or fault

    # --- collectives

    def _arrays(self, numbers: Numbers) -> tuple[Any, Any]:
        """send, and recv if the form wants one."""
        call, rank = self.call, self.comm.rank
        if call.form == "in place":
            return self._in_place(numbers)
        send = array_of(call, numbers.sent(rank), (numbers.sent_rows(rank), *call.rest))
        if call.form == "into" or (call.form in ("async", "again") and self.rng.random() < 0.5):
            return send, self._room(numbers)
        return send, None

    def _room(self, numbers: Numbers) -> Any:
        """Memory for this rank's result."""
        shape = (numbers.result_rows(self.comm.rank), *self.call.rest)
        return array_of(contiguous(self.call), spoilt(self.call, math.prod(shape)), shape)

    def _in_place(self, numbers: Numbers) -> tuple[Any, Any]:
        """The smaller one of both lies in the larger one."""
        call, rank = self.call, self.comm.rank
        rows = slice(numbers.starts[rank], numbers.starts[rank + 1])
        if call.kind in GATHERS:
            recv = self._room(numbers)
            recv[rows] = array_of(call, numbers.sent(rank), (numbers.sent_rows(rank), *call.rest))
            return recv[rows], recv
        send = array_of(call, numbers.sent(rank), (numbers.sent_rows(rank), *call.rest))
        return send, send if call.kind == "allreduce" else send[rows]

    def _collective(self, send: Any, recv: Any, **options: Any) -> Any:
        call, comm = self.call, self.comm
        if call.kind == "all_to_all":
            return comm.all_to_all(send, recv, **options)
        options |= {"algorithm": call.algorithm, "rings": call.rings}
        if call.kind in GATHERS:
            return getattr(comm, f"decomposed_{call.kind}")(send, recv, **options)
        if call.kind == "reduce_scatter" and call.flag:
            options["counts"] = self._numbers().rows
        return getattr(comm, f"decomposed_{call.kind}")(send, recv, op=call.op, **options)

    def _check(self, result: Any, recv: Any, numbers: Numbers) -> None:
        if recv is not None and result is not recv:
            self._say("the result is not recv")
        self._compare(bits_of(self.call, result), numbers.expected(self.comm.rank), "the result")

    def _compare(self, got: NDArray, wanted: NDArray, what: str) -> None:
        if len(got) != len(wanted):
            self._say(f"{what} has {len(got)} elements instead of {len(wanted)}")
        elif not np.array_equal(got, wanted):
            wrong = np.flatnonzero(got != wanted)
            self._say(f"{what}: {len(wrong)} of {len(wanted)} elements are wrong, the first at {wrong[0]}")

    def _together(self) -> None:
        """Several are under way, and waited for in any order."""
        under_way = []
        for salt in range(_BURST):
            numbers = self._numbers(salt)
            send, recv = self._arrays(numbers)
            under_way.append((self._collective(send, recv, async_op=True), recv, numbers))
        self.rng.shuffle(under_way)
        for work, recv, numbers in under_way:
            for _ in range(self.rng.choice((0, 0, 1, 5))):
                work.test()
            self._check(work.wait(), recv, numbers)

    def _again(self) -> None:
        """The same arrays with other contents each time."""
        send, recv = self._arrays(self._numbers())
        for salt in range(_BURST):
            numbers = self._numbers(salt)
            again = array_of(self.call, numbers.sent(self.comm.rank), tuple(send.shape))
            send[...] = again
            self._check(self._collective(send, recv), recv, numbers)

    def _disagree(self) -> None:
        """One rank passes something else: all must hear of it."""
        odd = self.call.number % self.comm.size
        count = 3 + (self.comm.rank == odd)
        try:
            send = np.zeros((self.comm.size, count), np.float32)
            if self.call.kind in STREAMS:
                getattr(self.comm, self.call.kind)(send)
            elif self.call.kind == "all_to_all":
                self.comm.all_to_all(send)
            else:
                getattr(self.comm, f"decomposed_{self.call.kind}")(send, algorithm=self.call.algorithm)
        except tasp_coll.MismatchError as error:
            if odd not in error.ranks:
                self._say(f"the disagreement does not name rank {odd}: {error}")
        else:
            if self.comm.size > 1:
                self._say("a disagreement was not noticed")

    # --- step by step

    def _gather_steps(self) -> None:
        call, comm, numbers = self.call, self.comm, self._numbers()
        send = array_of(call, numbers.sent(comm.rank), (numbers.sent_rows(comm.rank), *call.rest))
        options = {"reverse": call.flag, "donate": call.donate}
        every, seen = [numbers.sent(rank) for rank in range(comm.size)], 0
        with comm.allgather_steps(send, algorithm=call.algorithm, rings=call.rings, **options) as stream:
            for arrival in stream:
                for chunk in arrival.chunks:
                    wanted = every[chunk.source][chunk.start * numbers.row : chunk.stop * numbers.row]
                    self._compare(bits_of(call, chunk.data), wanted, f"step {arrival.step}, from rank {chunk.source}")
                    seen += len(wanted)
                if self._leaves(arrival.step):
                    return
        if seen != sum(map(len, every)):
            self._say(f"{seen} of {sum(map(len, every))} elements came")

    def _reduce_steps(self) -> None:
        call, comm, numbers = self.call, self.comm, self._numbers()
        mine, wanted = numbers.sent(comm.rank), numbers.reduced()[numbers.part(comm.rank)]
        recv = self._room(numbers)
        algorithm, rings = call.algorithm, call.rings
        with comm.reduce_scatter_steps(recv, algorithm=algorithm, rings=rings, accumulate=call.flag) as stream:
            for request in stream:
                for chunk in request.chunks:
                    first = numbers.starts[chunk.source] + chunk.start
                    part = mine[first * numbers.row : (first + chunk.stop - chunk.start) * numbers.row]
                    filled = array_of(contiguous(call), part, tuple(chunk.data.shape))
                    if call.flag:
                        chunk.data[...] += filled
                    else:
                        chunk.data[...] = filled
                if self._leaves(request.step):
                    return
        self._compare(bits_of(call, recv), wanted, "the sums")

    def _leaves(self, step: int) -> bool:
        """Whether the caller leaves the loop here; or else makes a call beside the stream."""
        if self.call.form == "beside":
            total = self.comm.decomposed_allreduce(np.full(_BESIDE, step + self.comm.rank, np.int64))
            if (total != sum(step + rank for rank in range(self.comm.size))).any():
                self._say(f"a sum beside the stream is wrong at step {step}")
        return self.call.form == "early" and step >= self.call.number % self.comm.size
