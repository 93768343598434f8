"""All-reduce and all-gather at few bits, on ranks of one process, and once over MPI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import Tensor

import dynasty
from loopback_ranks import attempt, on_ranks
from tasp_coll import ArgumentError, Communicator, MismatchError, PeerTimeoutError

FORMATS = ("dynamic", 2, 5, 8, "bfloat16", "float32")
MpiRun = Callable[..., CompletedProcess[str]]


def drawn(rank: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + sum(shape))
    return torch.randn(shape, generator=generator) * torch.randn(shape[:1], generator=generator).exp().view(
        -1, *[1] * (len(shape) - 1)
    )


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_ranks_get_the_same_bits_and_nearly_the_sum(ranks: int, bits: int | str) -> None:
    shapes = [(30, 41), (1,), (0, 3), (7, 5, 11)]

    def body(comm: Communicator) -> tuple[list[Tensor], dynasty.Sent]:
        grads = [drawn(comm.rank, *shape) for shape in shapes]
        grads[0] = grads[0].t().contiguous().t()
        return grads, dynasty.all_reduce(grads, comm, op="sum", bits=bits)

    found = on_ranks(ranks, body)
    for at, shape in enumerate(shapes):
        true = sum(drawn(rank, *shape).double() for rank in range(ranks))
        assert all(torch.equal(grads[at], found[0][0][at]) for grads, _ in found)
        assert isinstance(true, Tensor)
        assert found[0][0][at].shape == true.shape
        if true.numel() > 1:
            off = float((found[0][0][at] - true).norm() / true.norm())
            assert off < {"dynamic": 0.7, 2: 1.1, 5: 0.2, 8: 0.02, "bfloat16": 0.01, "float32": 1e-6}[bits]
    for _, sent in found:
        assert sent.bytes > 0
        assert 0 <= sent.error < 1
        assert sent.seconds >= sent.pack_seconds >= 0
        if bits == "float32":
            assert sent.bytes == sent.float32_bytes
            assert sent.mean_bits == pytest.approx(32, rel=1e-3)


def test_a_budget_is_kept() -> None:
    def body(comm: Communicator) -> float:
        return dynasty.all_reduce(drawn(comm.rank, 256, 256), comm, mean_bits=3.5).mean_bits

    assert all(3.4 < bits < 3.52 for bits in on_ranks(2, body))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (257,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_small_tensors_and_other_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        grads = torch.full(shape, comm.rank + 1.0, dtype=dtype)
        dynasty.all_reduce(grads, comm, bits=8)
        gathered, _ = dynasty.all_gather(torch.full(shape, comm.rank + 1.0, dtype=dtype), comm, bits=8)
        return grads, gathered

    for grads, gathered in on_ranks(2, body):
        assert grads.dtype == gathered.dtype == dtype
        torch.testing.assert_close(grads, torch.full(shape, 1.5, dtype=dtype), rtol=2e-2, atol=0)
        expected = torch.cat([torch.full(shape or (1,), rank + 1.0, dtype=dtype) for rank in range(2)])
        torch.testing.assert_close(gathered, expected, rtol=2e-2, atol=0)


def test_one_rank_loses_nothing() -> None:
    def body(comm: Communicator) -> None:
        grads, kept = drawn(0, 300), drawn(0, 300)
        sent = dynasty.all_reduce(grads, comm, bits=2)
        assert torch.equal(grads, kept)
        assert (sent.bytes, sent.float32_bytes, sent.mean_bits, sent.error) == (0, 0, 0, 0)
        gathered, _ = dynasty.all_gather(grads, comm, bits=2)
        assert torch.equal(gathered, kept)
        assert gathered.data_ptr() != grads.data_ptr()
        with pytest.raises(ArgumentError, match="bits must be"):
            dynasty.all_reduce(grads, comm, bits=1)

    on_ranks(1, body)


@pytest.mark.parametrize("bits", [2, "dynamic"])
@pytest.mark.parametrize("op", ["mean", "sum"])
def test_with_feedback_nothing_is_lost_in_the_long_run(bits: int | str, op: str) -> None:
    """The mean over calls comes nearer with it, also across a checkpoint, and stays where it is without."""
    calls = 24

    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        feedback = dynasty.Feedback()
        totals = [torch.zeros(5, 300), torch.zeros(5, 300)]
        for call in range(calls):
            if call == calls // 2:
                state, feedback = feedback.state_dict(), dynasty.Feedback()
                feedback.load_state_dict(state)
            for total, kept in zip(totals, (feedback, None), strict=True):
                grads = drawn(comm.rank, 5, 300)
                dynasty.all_reduce(grads, comm, op=op, bits=bits, mean_bits=2.5, feedback=kept)
                total += grads / calls
        return totals[0], totals[1]

    true = sum(drawn(rank, 5, 300).double() for rank in range(3)) / (3 if op == "mean" else 1)
    assert isinstance(true, Tensor)
    kept, lost = (float((total - true).norm() / true.norm()) for total in on_ranks(3, body)[0])
    assert kept < 4 / calls
    assert kept < lost / 3


def test_stochastic_rounding_needs_no_feedback() -> None:
    def body(comm: Communicator) -> Tensor:
        generator, total = torch.Generator().manual_seed(comm.rank), torch.zeros(600)
        for _ in range(100):
            grads = drawn(comm.rank, 600)
            dynasty.all_reduce(grads, comm, bits=3, generator=generator)
            total += grads / 100
        return total

    true = (drawn(0, 600) + drawn(1, 600)) / 2
    off = on_ranks(2, body)[0] - true
    assert float(off.norm() / true.norm()) < 0.3
    assert abs(float(off.mean())) < 0.05 * float(true.abs().mean())


@pytest.mark.parametrize("bits", FORMATS)
def test_what_is_not_finite_reaches_all_and_is_forgotten(bits: int | str) -> None:
    def body(comm: Communicator) -> list[Tensor]:
        feedback, found = dynasty.Feedback(), []
        for call in range(2):
            grads = drawn(comm.rank, 4, 256)
            if comm.rank == 1 and call == 0:
                grads[0, 5], grads[2, 7] = torch.nan, torch.inf
            dynasty.all_reduce(grads, comm, bits=bits, feedback=feedback)
            found.append(grads)
        return found

    for first, second in on_ranks(2, body):
        assert not bool(first[0].isfinite().all())
        assert not bool(first[2].isfinite().all())
        assert bool(first[1].isfinite().all())
        assert bool(first[3].isfinite().all())
        assert bool(second.isfinite().all())


@pytest.mark.parametrize("bits", FORMATS)
def test_shards_of_different_lengths_are_gathered(bits: int | str) -> None:
    rows = (3, 0, 200)

    def body(comm: Communicator) -> tuple[Tensor, dynasty.Sent]:
        return dynasty.all_gather(drawn(comm.rank, rows[comm.rank], 5), comm, bits=bits, feedback=dynasty.Feedback())

    found = on_ranks(3, body)
    true = torch.cat([drawn(rank, rows[rank], 5) for rank in range(3)])
    assert all(torch.equal(gathered, found[0][0]) for gathered, _ in found)
    off = float((found[0][0] - true).norm() / true.norm())
    assert off < {"dynamic": 0.5, 2: 1, 5: 0.3, 8: 0.03, "bfloat16": 0.01, "float32": 0}[bits] + 1e-9
    assert found[1][1].bytes == 0


def test_feedback_of_gathered_shards() -> None:
    def body(comm: Communicator) -> Tensor:
        feedback = dynasty.Feedback()
        gathered = [dynasty.all_gather(drawn(comm.rank, 300), comm, bits=3, feedback=feedback)[0] for _ in range(20)]
        return torch.stack(gathered).mean(0)

    true = torch.cat([drawn(0, 300), drawn(1, 300)])
    assert float((on_ranks(2, body)[0] - true).norm() / true.norm()) < 0.05


@pytest.mark.parametrize(
    "argument, odd, told",
    [
        ("op", "sum", "rank 1 passed op=sum, where others passed op=mean"),
        ("bits", 8, "bits"),
        ("mean_bits", 3.0, "mean_bits"),
        ("grads", torch.ones(9), "elements"),
        ("grads", [1.0], "rank 1 was called with a bad argument: grads must be floating-point tensors, got float"),
        ("grads", torch.ones(8).int(), "bad argument: grads must be"),
        ("grads", None, "bad argument: grads must be tensors"),
        ("bits", 1, "bad argument: bits must be"),
        ("op", "max", "bad argument: op must be"),
    ],
)
def test_ranks_that_differ_are_told_so(argument: str, odd: object, told: str) -> None:
    def body(comm: Communicator) -> None:
        arguments: dict[str, Any] = {"grads": torch.ones(8), "op": "mean"}
        if comm.rank == 1:
            arguments[argument] = odd
        error = attempt(lambda: dynasty.all_reduce(arguments.pop("grads"), comm, **arguments))
        assert isinstance(error, MismatchError)
        assert told in str(error)
        grads = torch.ones(8)
        dynasty.all_reduce(grads, comm, op="sum", bits=8)
        torch.testing.assert_close(grads, torch.full((8,), 3.0), rtol=0.01, atol=0)

    on_ranks(3, body)


def test_a_bad_argument_on_all_ranks_is_that() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ArgumentError, match="mean_bits must be a number from 1 to 8, got 0"):
            dynasty.all_reduce(torch.ones(8), comm, mean_bits=0)
        with pytest.raises(ArgumentError, match="must be floating-point"):
            dynasty.all_gather(torch.ones(8).int(), comm)
        assert isinstance(attempt(lambda: dynasty.all_gather(torch.ones(8, 1 + comm.rank), comm)), MismatchError)

    on_ranks(2, body)


def test_a_call_that_fails_leaves_everything_as_it_was() -> None:
    def body(comm: Communicator) -> None:
        feedback, before = dynasty.Feedback(), drawn(comm.rank, 900)
        dynasty.all_reduce(before.clone(), comm, bits=3, feedback=feedback)
        state = {name: x.clone() if isinstance(x, Tensor) else x for name, x in feedback.state_dict().items()}
        if comm.rank == 1:
            return
        grads = before.clone()
        with pytest.raises((PeerTimeoutError, MismatchError)):
            dynasty.all_reduce(grads, comm, bits=3, feedback=feedback)
        assert torch.equal(grads, before)
        assert torch.equal(feedback.state_dict()["lost"], state["lost"])

    on_ranks(2, body, timeout=1)


def test_feedback_takes_only_what_it_gave() -> None:
    feedback = dynasty.Feedback()
    for state in ({}, {"of": 3, "lost": None}, {"of": "x", "lost": torch.ones(3).int()}):
        with pytest.raises(ArgumentError, match="state must be what"):
            feedback.load_state_dict(state)
    feedback.load_state_dict(dynasty.Feedback().state_dict())


def test_over_mpi(mpirun: MpiRun, tmp_path: Path) -> None:
    script = tmp_path / "reduce.py"
    script.write_text(
        "import torch, dynasty, tasp_coll\n"
        "with tasp_coll.Communicator() as comm:\n"
        "    grads = torch.arange(1000.0) * (comm.rank + 1)\n"
        "    sent = dynasty.all_reduce(grads, comm, op='sum', bits=8, feedback=dynasty.Feedback())\n"
        "    both = comm.decomposed_allgather(grads[None])\n"
        "    assert torch.equal(both[0], both[1])\n"
        "    assert float((grads - 3 * torch.arange(1000.0)).abs().max()) < 30\n"
        "    gathered, _ = dynasty.all_gather(grads[: 3 * comm.rank], comm, bits='dynamic')\n"
        "    assert gathered.shape == (3,)\n"
    )
    ended = mpirun(2, [script])
    assert ended.returncode == 0, ended.stdout + ended.stderr
