"""tools/break_links.py: what is judged of a job, and small jobs whose link is really cut."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import break_links
import break_links_options
import vcluster_job
from break_links_cases import SCENARIOS, BreakCase, cases
from break_links_report import Result, heading
from break_links_run import Stage, cuttable, staged
from break_links_seen import Bounds, Call, Failure, Seen
from tasp_coll import ArgumentError, Topology
from vcluster_room import MissingError

RANKS = 4
CUT = BreakCase("cut", "cut", "down", call_s=1, before=3, after=3)
WHOLE, LEFT = "whole", "whole without 0-1"


def seen(case: BreakCase = CUT, **other: Any) -> Seen:
    """A job that kept all promises: calls of a second, the fourth of three, the rest by the new bound."""
    calls = []
    for number in range(case.calls):
        began, took = 10.0 * number, 3.0 if number == case.before else 1.5 if number > case.before else 1.0
        what = (LEFT, ((0, 1), (1, 0)), ("gone",)) if number >= case.before else (WHOLE, (), ())
        name, dead, told = what
        calls += [
            Call(rank, number, began + rank / 100, began + took, 0, True, name, dead, (), told) for rank in range(RANKS)
        ]
    fault = 10.0 * case.before + 0.5, 10.0 * case.before + 0.6
    good = Seen(case, (0, 1), RANKS, 3.0, True, Bounds(0.99, 1.4), fault, 0, False, 0, tuple(calls), (), "")
    return replace(good, **other)


def changed(calls: tuple[Call, ...], number: int, ranks: tuple[int, ...] = (2,), **what: Any) -> tuple[Call, ...]:
    return tuple(replace(each, **what) if each.call == number and each.rank in ranks else each for each in calls)


def test_promises_that_were_kept() -> None:
    assert seen().broken == ()
    assert seen().planned_anew == 4
    assert seen().share == pytest.approx(1.4 / 1.47)
    assert seen().intact_s == pytest.approx(0.97)
    row = str(Result("allgather", CUT, (seen(), seen())))
    assert row.split() == ["allgather", "cut", "2", "14/14", "0.97", "2.97", "0.952", "0.952", "2/2"]
    assert len(heading()) >= len(row) - 3


@pytest.mark.parametrize(
    "what, told",
    [
        ({"hung": True}, "the job hung after call 6"),
        ({"calls": changed(seen().calls, 5, wrong=7)}, "call 5: rank 2 has 7 wrong elements"),
        ({"calls": changed(seen().calls, 5, unchanged=False)}, "call 5: what rank 2 sent has changed"),
        ({"calls": changed(seen().calls, 5, topology=WHOLE)}, "call 5: ranks disagree about what is left"),
        ({"calls": changed(seen().calls, 6, dead=())}, "rank 2 ends with 'whole without 0-1', where (0, 1) was broken"),
        ({"calls": changed(seen().calls, 3, ended=40.0)}, "call 3 took 9.97 s, more than 6.97 s"),
        ({"calls": seen().calls[:-1]}, "27 of 28 results"),
        ({"left": 2}, "2 processes are left"),
        ({"status": 9, "said": "killed"}, "the job ended with status 9: killed"),
        ({"fault": None, "said": "no module"}, "ended before its link was broken, with status 0: no module"),
        ({"bounds": Bounds(0.5, 0.7)}, "0.476 of the cut bound with the new plan, less than 0.9"),
        (
            {"failures": (Failure(1, 3, 30, 31, "MismatchError", (), "odd"),)},
            "call 3: rank 1 raised MismatchError: odd",
        ),
    ],
)
def test_promises_that_were_broken(what: dict[str, Any], told: str) -> None:
    assert any(told in each for each in seen(**what).broken)


def test_without_healing_the_call_raises_on_every_rank_in_time_and_names_the_link() -> None:
    raised = tuple(
        Failure(rank, 3, 30.0, 34.5, "PeerTimeoutError", ((0, 1),), "0 and 1 do not hear each other")
        for rank in range(4)
    )
    before = tuple(each for each in seen().calls if each.call < 3)
    good = seen(self_heal=False, calls=before, failures=raised, status=3)
    assert good.broken == ()
    assert Result("allgather", CUT, (good,)).exact == (3, 3)
    for what, told in [
        ({"failures": raised[:-1]}, "rank 3 raised nothing"),
        ({"failures": (*raised[:-1], replace(raised[3], links=()))}, "rank 3 names (), not (0, 1)"),
        ({"failures": (*raised[:-1], replace(raised[3], kind="MismatchError"))}, "rank 3 raised MismatchError"),
        ({"failures": (*raised[:-1], replace(raised[3], ended=37.0))}, "rank 3 raised 6.03 s after all else was done"),
        ({"status": 0}, "the job ended with status 0"),
    ]:
        assert any(told in each for each in replace(good, **what).broken), told


def test_cases_and_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    asked = break_links_options.parse("break_links", "", shlex.split("--scenario cut,loss --rounds 20"))
    found = list(cases(asked.scenario, asked.rounds, asked.timeout))
    assert [case.name for case in found][:2] == ["cut", "1 % lost"]
    assert found[0].jobs == 20
    assert all(case.after + 1 == 100 for case in found[1:])
    assert {case.scenario for case in cases(SCENARIOS, 1, 3)} == set(SCENARIOS)
    for line, told in [
        ("--scenario melt", "must be some of cut, "),
        ("--rounds 0", "must be an integer > 0, got '0'"),
        ("--timeout nan", "must be a number > 0, got 'nan'"),
        ("--no-heal --scenario slow", "--no-heal leaves nothing to judge of slow"),
        ("--json /nowhere/x.json", "must be a file in a directory that can be written to"),
    ]:
        with pytest.raises(SystemExit) as left:
            break_links.main(shlex.split(line))
        assert left.value.code == 2
        assert told in capsys.readouterr().err


def test_only_links_that_can_be_done_without_are_cut() -> None:
    assert len(cuttable(Topology.preset("full_mesh:4"))) == 6
    with pytest.raises(ArgumentError, match="can do without, got 'nvswitch:4'"):
        cuttable(Topology.preset("nvswitch:4"))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A small cluster for the jobs of this module; skips, with the reason, where there can be none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASP_COLL_CLUSTERS", str(tmp_path_factory.mktemp("clusters")))
        try:
            launcher = vcluster_job.mpiexec()
            with staged("full_mesh:4", 20) as (cluster, room, topology):
                yield Stage(cluster, room, topology, launcher, "allgather", 3.0, True, 0)
        except MissingError as error:
            pytest.skip(f"no virtual clusters on this machine: {error}")


# Calls enough for the cut to come on a busy machine.
SMALL = BreakCase("cut", "cut", "down", call_s=0.3, before=2, after=7)


def test_a_cut_link_costs_no_result(stage: Stage, tmp_path: Path) -> None:
    found = stage.play(SMALL, 0)
    assert (found.status, found.hung, found.left, found.failures) == (0, False, 0, ()), found.said
    assert len(found.calls) == SMALL.calls * 4
    assert all(each.wrong == 0 and each.unchanged for each in found.calls)
    last = [each for each in found.calls if each.call == SMALL.calls - 1]
    assert found.link is not None
    assert {each.dead for each in last} == {(found.link, found.link[::-1])}
    assert any(each.warnings for each in found.calls)


def test_without_healing_a_cut_link_is_named(stage: Stage) -> None:
    found = replace(stage, self_heal=False).play(SMALL, 0)
    assert (found.hung, found.left) == (False, 0)
    assert found.status
    assert {(each.kind, each.links) for each in found.failures} == {("PeerTimeoutError", (found.link,))}
    assert {each.rank for each in found.failures} == set(range(4))
