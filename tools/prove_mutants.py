"""Schedules changed in one place, as a bug or a tired user would."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from prove_cases import Steps
from tasp_coll import Schedule, Transfer


def _places(steps: Steps) -> list[tuple[int, int]]:
    return [(s, i) for s, step in enumerate(steps) for i in range(len(step))]


def _dropped(rng: Random, steps: Steps, schedule: Schedule) -> None:
    step, index = rng.choice(_places(steps))
    del steps[step][index]


def _repeated(rng: Random, steps: Steps, schedule: Schedule) -> None:
    step, index = rng.choice(_places(steps))
    rng.choice(steps[step:]).append(steps[step][index])


def _moved(rng: Random, steps: Steps, schedule: Schedule) -> None:
    step, index = rng.choice(_places(steps))
    moved = steps[step].pop(index)
    rng.choice(steps).append(moved)


def _exchanged(rng: Random, steps: Steps, schedule: Schedule) -> None:
    (s, i), (t, j) = rng.choice(_places(steps)), rng.choice(_places(steps))
    steps[s][i], steps[t][j] = steps[t][j], steps[s][i]


def _steps_exchanged(rng: Random, steps: Steps, schedule: Schedule) -> None:
    s, t = rng.randrange(len(steps)), rng.randrange(len(steps))
    steps[s], steps[t] = steps[t], steps[s]


def _step_dropped(rng: Random, steps: Steps, schedule: Schedule) -> None:
    del steps[rng.randrange(len(steps))]


def _backwards(rng: Random, steps: Steps, schedule: Schedule) -> None:
    steps.reverse()


def _turned(rng: Random, steps: Steps, schedule: Schedule) -> None:
    step, index = rng.choice(_places(steps))
    old = steps[step][index]
    steps[step][index] = old._replace(src=old.dst, dst=old.src)


def _relabelled(field: str) -> Callable[[Random, Steps, Schedule], None]:
    def change(rng: Random, steps: Steps, schedule: Schedule) -> None:
        step, index = rng.choice(_places(steps))
        limit = {"chunk": schedule.chunks, "ring": schedule.ring_count + 1}.get(field, schedule.ranks)
        steps[step][index] = steps[step][index]._replace(**{field: rng.randrange(limit)})

    return change


KINDS: dict[str, Callable[[Random, Steps, Schedule], None]] = {
    "dropped": _dropped,
    "repeated": _repeated,
    "moved": _moved,
    "exchanged": _exchanged,
    "steps exchanged": _steps_exchanged,
    "step dropped": _step_dropped,
    "backwards": _backwards,
    "turned round": _turned,
    "wrong receiver": _relabelled("dst"),
    "wrong sender": _relabelled("src"),
    "wrong shard": _relabelled("origin"),
    "wrong chunk": _relabelled("chunk"),
    "wrong ring": _relabelled("ring"),
}


def rebuilt(schedule: Schedule, steps: Steps) -> Schedule:
    """The schedule with other steps, as a user would hand it in. Raises what `Schedule.from_steps` does."""
    return Schedule.from_steps(
        schedule.topology,
        schedule.collective,
        steps,
        weights=schedule.weights,
        capacity_share=schedule.capacity_share,
    )


def mutant_of(rng: Random, schedule: Schedule, steps: Steps) -> tuple[str, Steps] | None:
    """The kind of change, and the changed steps; None where nothing came of it."""
    changed: list[list[Transfer]] = [list(step) for step in steps]
    kind = rng.choice(list(KINDS))
    if not _places(changed):
        return None
    KINDS[kind](rng, changed, schedule)
    same = [sorted(step) for step in changed] == [sorted(step) for step in steps]
    return None if same else (kind, changed)
