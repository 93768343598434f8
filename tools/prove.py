"""Hold proofs against executions, on random topologies and schedules.

What is proved must run right, and what runs wrong must have been refused.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

import prove_options
import tasp_coll
from prove_cases import Case, case_of
from prove_mutants import mutant_of, rebuilt
from prove_options import Options
from prove_run import sizes_of, wrong, wrong_by_communicator
from tasp_coll import CollectiveError, Schedule, ScheduleError
from tasp_coll.core import max_rings
from tasp_coll.files import writing

TOOL = "prove"
BY_COMMUNICATOR = 10  # every so many cases take the way of users, in threads
# Rules that are stricter than the result: what else is refused must run wrong, or not to its end.
STRICT = {
    "a link above its capacity share": ("its share is",),
    "two chunks at once on a ring's link": ("a ring carries more than one chunk",),
    "a chunk sent twice": ("received although it is there already", "received twice in one step"),
    "sent before the step after it came": ("sent before it was received", "received after the rank sent its sum on"),
}


@dataclass
class Tally:
    """What was seen. mutants: by what became of them; strict: of those that would have run right, the rule."""

    cases: int = 0
    runs: int = 0
    mutants: Counter[str] = field(default_factory=Counter)
    strict: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    disagreements: list[str] = field(default_factory=list)


def prove(options: Options, tally: Tally) -> None:
    """All cases."""
    begun = time.monotonic()
    for number in _bar(range(options.first, options.first + options.cases)):
        if options.seconds is not None and time.monotonic() - begun > options.seconds:
            break
        rng = Random(f"{options.seed}/{number}")
        again = f"python tools/prove.py --seed {options.seed} --first {number} --cases 1 --ranks {options.ranks}"
        case = case_of(rng, options.ranks)
        tally.cases += 1
        tally.kinds[case.told.partition(" on ")[0]] += 1
        tally.disagreements += [f"{case.told}: {told}\n  again: {again}" for told in case_faults(case, tally, number)]
        for told in mutant_faults(case, rng, options.mutants, tally):
            tally.disagreements.append(f"{case.told}: {told}\n  again: {again}")


def case_faults(case: Case, tally: Tally, number: int) -> Iterator[str]:
    """Where a sound schedule does not pass its proof, or does not run right."""
    schedule = case.schedule
    if error := _refusal(schedule):
        yield f"is refused: {error}"
    for rows in (None, case.rows) if schedule.collective != "all_to_all" else (None,):
        sizes = sizes_of(schedule, rows)
        tally.runs += 1
        if told := wrong(schedule, sizes):
            yield f"is proved, and runs wrong with shards of {sizes} bytes: {told}"
    few = schedule.collective != "all_to_all" and schedule.ring_count <= max_rings(schedule.ranks)
    if few and number % BY_COMMUNICATOR == 0:
        tally.runs += 1
        if told := wrong_by_communicator(schedule, sizes_of(schedule)):
            yield f"is proved, and runs wrong: {told}"


def mutant_faults(case: Case, rng: Random, count: int, tally: Tally) -> Iterator[str]:
    """Where a changed schedule is proved and runs wrong, or is refused for nothing."""
    for _ in range(count):
        if (found := mutant_of(rng, case.schedule, case.steps)) is None:
            continue
        kind, steps = found
        try:
            mutant = rebuilt(case.schedule, steps)
        except CollectiveError:
            tally.mutants["refused when made"] += 1
            continue
        error, told = _refusal(mutant), wrong(mutant, sizes_of(mutant))
        tally.runs += 1
        if error is None:
            tally.mutants["proved, runs right"] += not told
            if told:
                yield f"mutant ({kind}) is proved, and runs wrong: {told}\n  {steps}"
        elif told:
            tally.mutants["refused, runs wrong"] += 1
        elif rule := _strict_rule(str(error)):
            tally.mutants["refused by a stricter rule"] += 1
            tally.strict[rule] += 1
        else:
            yield f"mutant ({kind}) is refused, and runs right: {error}\n  {steps}"


def _refusal(schedule: Schedule) -> ScheduleError | None:
    try:
        schedule.verify()
    except ScheduleError as error:
        return error
    return None


def _strict_rule(message: str) -> str | None:
    return next((rule for rule, parts in STRICT.items() if any(part in message for part in parts)), None)


def _bar(work: range) -> Iterable[int]:
    """A progress bar, on a terminal, if tqdm is there."""
    if not sys.stderr.isatty():
        return work
    try:
        from tqdm import tqdm
    except ImportError:
        return work
    return iter(tqdm(work, unit="case", leave=False))


def report(tally: Tally) -> None:
    """For people."""
    print(f"{tally.cases} cases, {sum(tally.mutants.values())} mutants, {tally.runs} runs")
    for kind, count in tally.mutants.most_common():
        print(f"  {count:>8} mutants: {kind}")
    for rule, count in tally.strict.most_common():
        print(f"  {count:>8}   of these: {rule}")
    print(f"{len(tally.disagreements)} disagreements of proof and execution")
    for told in tally.disagreements[:10]:
        print(f"\n{told[:3000]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Wrong usage leaves by SystemExit(2)."""
    options = prove_options.parse(argv, __doc__)
    tally = Tally()
    with suppress(KeyboardInterrupt):  # tells what was seen
        prove(options, tally)
    report(tally)
    if options.json is not None:
        head = {"tool": TOOL, "version": tasp_coll.__version__, "seed": options.seed}
        with writing(options.json) as partial:
            partial.write_text(json.dumps({**head, "results": [vars(tally)]}, indent=1) + "\n", encoding="utf-8")
    return 1 if tally.disagreements else 0


if __name__ == "__main__":
    sys.exit(main())
