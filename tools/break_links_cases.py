"""What break_links.py does to links, case by case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

SCENARIOS = ("cut", "cut_and_restored", "slow", "loss", "delay", "jitter")
WORKLOADS = ("allgather", "allreduce", "steps", "attention")
NOTHING_TO_HEAL = ("cut", "loss", "delay", "jitter")  # what makes sense without self_heal
_LONG_S, _SHORT_S, _BRIEF_S = 2.0, 0.5, 0.1  # of a call on links that are intact
_STEADY_CALLS = 5  # for each of --rounds


@dataclass(frozen=True)
class Task:
    """What all ranks of a job do. nbytes: of a rank's shard, or of what is summed up."""

    workload: str
    nbytes: int
    calls: int
    timeout: float
    self_heal: bool
    seed: int


@dataclass(frozen=True)
class BreakCase:
    """A fault that is inflicted at a random moment of a call, in every job of the case.

    call_s: what a call should take on intact links. before: calls on them, the first of which is not timed; the fault
    comes in the next, and `after` calls follow. restored_s: when the link is made as new again. jobs: with the same
    fault, of other links at other moments. everywhere: all links have it, not one, and from the start.
    """

    scenario: str
    name: str
    fault: str
    amount: float | None = None
    jitter_ms: float = 0.0
    call_s: float = _BRIEF_S
    before: int = 3
    after: int = 4
    jobs: int = 1
    restored_s: float | None = None
    everywhere: bool = False

    @property
    def calls(self) -> int:
        """Of a job."""
        return self.before + 1 + self.after


def cases(scenarios: tuple[str, ...], rounds: int, timeout: float) -> Iterator[BreakCase]:
    """The cases of these scenarios."""
    steady = _STEADY_CALLS * rounds - 1
    cut = BreakCase("cut", "cut", "down", call_s=_LONG_S, jobs=rounds)
    for scenario in scenarios:
        if scenario == "cut":
            yield cut
        elif scenario == "cut_and_restored":
            for share in (0.25, 1.5):
                seconds = share * timeout
                yield replace(cut, scenario=scenario, name=f"cut for {seconds:g} s", restored_s=seconds)
        elif scenario == "slow":
            yield BreakCase(scenario, "10 times slower", "slower", 10, call_s=_SHORT_S, after=9, jobs=rounds)
        elif scenario == "loss":
            for everywhere in (False, True):
                for percent in (1, 5):
                    name = f"{percent} % lost{', all links' if everywhere else ''}"
                    before = 0 if everywhere else 3
                    yield BreakCase(
                        scenario, name, "lossy", percent, before=before, after=steady, everywhere=everywhere
                    )
        elif scenario == "delay":
            yield BreakCase(scenario, "20 ms later", "delayed", 20, after=steady)
        else:
            yield BreakCase(scenario, "20 +- 10 ms later", "delayed", 20, 10, after=steady)
