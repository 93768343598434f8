"""Hold the sensitivities that dynamic precision chooses its bits by against what bits do to the loss, measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import sensitivity_options
import tasp_coll
from sensitivity_options import Options
from tasp_coll.files import writing

if TYPE_CHECKING:
    from sensitivity_figures import Moment

TOOL = "sensitivity_check"


def check(options: Options) -> list[str]:
    """Train, measure, and tell; what does not hold."""
    import torch

    import sensitivity_run
    from sensitivity_figures import faults
    from train_dynasty_sets import load

    torch.set_num_threads(options.threads)
    data = load("fashion-mnist", options.data)
    least = options.images + options.batches * options.batch
    if least > len(data.train):
        raise ValueError(f"--images and --batches need {least} images, and there are {len(data.train)}")
    seen: list[Moment] = []
    told = []
    for name in options.model:
        for late, moment in enumerate(sensitivity_run.moments(options, name, data)):
            report(moment)
            seen.append(moment)
            told += faults(moment, bool(late))
    if options.json is not None:
        with writing(options.json) as partial:
            partial.write_text(json.dumps(_json(options, seen), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.plot is not None:
        from sensitivity_plot import draw

        draw(options.plot, seen)
    return told


def report(moment: Moment) -> None:
    """For people."""
    print(
        f"{moment.model} after {moment.step} steps, loss {moment.loss:.3f}, analytics {moment.analytics_share:.2%}\n"
        f"  {'':28} {'blocks':>6} {'estimate':>8} {'error only':>10} {'first order':>11} {'truth':>6}"
    )
    for each in moment.figures:
        print(
            f"  {each.title:28} {each.blocks:6} {each.estimate:8.3f} {each.error_only:10.3f} {each.first_order:11.3f} "
            f"{each.reliability:6.3f}",
            flush=True,
        )


def _json(options: Options, moments: Sequence[Moment]) -> dict[str, Any]:
    asked = {name: value for name, value in vars(options).items() if name not in ("data", "json", "plot")}
    return {"tool": TOOL, "version": tasp_coll.__version__, "setting": asked, "results": [_entry(m) for m in moments]}


def _entry(moment: Moment) -> dict[str, Any]:
    blocks = [{**vars(block), "changes": block.changes.tolist(), "truth": block.truth} for block in moment.blocks]
    figures = [{name: value if value == value else None for name, value in vars(f).items()} for f in moment.figures]
    return {**vars(moment), "figures": figures, "blocks": blocks}


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
