"""Hold the sensitivities that dynamic precision chooses its bits by against what bits do to the loss, measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any

import sensitivity_options
import tasp_coll
from sensitivity_options import Options
from tasp_coll.files import writing

if TYPE_CHECKING:
    from sensitivity_figures import Moment, Seen

TOOL = "sensitivity_check"


def check(options: Options) -> list[str]:
    """Train, measure, and tell; what does not hold."""
    from sensitivity_figures import Seen, faults
    from train_dynasty_sets import load

    images = len(load("fashion-mnist", options.data).train)
    least = options.images + options.batches * options.batch
    if least > images:
        raise ValueError(f"--images and --batches need {least} images, and there are {images}")
    seen: list[Seen] = []
    told = []
    trainings = _trainings(options)
    for _ in options.model:
        looks = list(zip(*islice(trainings, len(options.seeds)), strict=True))
        for moments in looks:
            seen.append(Seen(moments))
            report(seen[-1])
            told += faults(seen[-1], moments is looks[-1])
    if options.json is not None:
        with writing(options.json) as partial:
            partial.write_text(json.dumps(_json(options, seen), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.plot is not None:
        from sensitivity_plot import draw

        draw(options.plot, seen)
    return told


def _trainings(options: Options) -> Iterator[list[Moment]]:
    """Each model's for each seed, in this order, as they finish."""
    import sensitivity_run
    from train_dynasty_run import workers

    tasks = [(name, seed) for name in options.model for seed in options.seeds]
    if options.jobs == 1:
        yield from (sensitivity_run.moments(options, *task) for task in tasks)
        return
    with workers(options.jobs) as pool:
        futures = [pool.submit(sensitivity_run.moments, options, *task) for task in tasks]
        yield from (future.result() for future in futures)


def report(seen: Seen) -> None:
    """For people."""
    seeds = f"{len(seen.moments)} seeds, " if len(seen.moments) > 1 else ""
    print(
        f"{seen.model} after {seen.step} steps, {seeds}loss {seen.loss:.3f}, analytics {seen.analytics_share:.2%}\n"
        f"  {'':28} {'blocks':>6} {'estimate':>14} {'error only':>10} {'step before':>11} "
        f"{'first order':>11} {'truth':>6}"
    )
    for each in seen.figures:
        half = "" if each.half is None else f"+-{each.half:.3f}"
        print(
            f"  {each.title:28} {each.blocks:6} {each.estimate:6.3f} {half:7} {each.error_only:10.3f} "
            f"{each.step_before:11.3f} {each.first_order:11.3f} {each.reliability:6.3f}",
            flush=True,
        )


def _json(options: Options, seen: Sequence[Seen]) -> dict[str, Any]:
    asked = {name: value for name, value in vars(options).items() if name not in ("data", "json", "plot")}
    return {
        "tool": TOOL,
        "version": tasp_coll.__version__,
        "setting": asked,
        "results": [_of_all(each) for each in seen],
    }


def _of_all(seen: Seen) -> dict[str, Any]:
    shared = {name: getattr(seen, name) for name in ("model", "step", "loss", "analytics_share")}
    return {**shared, "figures": _figures(seen), "seeds": [_of_one(moment) for moment in seen.moments]}


def _of_one(moment: Moment) -> dict[str, Any]:
    blocks = [{**vars(block), "changes": block.changes.tolist(), "truth": block.truth} for block in moment.blocks]
    return {**vars(moment), "figures": _figures(moment), "blocks": blocks}


def _figures(of: Seen | Moment) -> list[dict[str, Any]]:
    """NaN is no JSON."""
    return [{name: value if value == value else None for name, value in vars(each).items()} for each in of.figures]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Wrong usage leaves by SystemExit(2)."""
    options = sensitivity_options.parse(argv, __doc__)
    wanted = ("torch", "matplotlib") if options.plot is not None else ("torch",)
    if missing := [name for name in wanted if find_spec(name) is None]:
        print(f"{TOOL}: needs {', '.join(missing)}: pip install 'tasp-coll[attention,plot]'", file=sys.stderr)
        return 2
    from train_dynasty_sets import DataError

    try:
        told = check(options)
    except (DataError, ValueError) as error:
        print(f"{TOOL}: {error}", file=sys.stderr)
        return 2
    for line in told:
        print(line)
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
