"""The command line of sensitivity_check.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf_options import integer, several

MODELS = ("cnn", "resnet")
OVERALL, WITHIN, ANALYTICS = 0.9, 0.7, 0.03  # what must hold
FEWEST = 8  # blocks of a layer, that a rank correlation is told of


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    model: tuple[str, ...]
    blocks: int
    batches: int
    dithers: int
    bits: int
    early: tuple[int, ...]
    epochs: int
    images: int
    batch: int
    seeds: tuple[int, ...]
    jobs: int
    threads: int
    data: Path | None
    json: Path | None
    plot: Path | None


def parse(argv: Sequence[str] | None, about: str | None = None) -> Options:
    """Options from the command line; `--help` and bad flags end the process."""
    parser = argparse.ArgumentParser(
        prog="sensitivity_check.py",
        description=about,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_truth(parser.add_argument_group("what is measured"))
    _add_training(parser.add_argument_group("in which training"))
    group = parser.add_argument_group("output")
    group.add_argument("-J", "--json", type=Path, metavar="PATH", help="write all figures, and every block's")
    group.add_argument("--plot", type=Path, metavar="PATH", help="draw estimates over truths, as .png, .svg or .pdf")
    options = Options(**vars(parser.parse_args(argv)))
    if fault := _fault(options):
        parser.error(fault)
    return options


def _add_truth(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", type=several(_model), default=MODELS, metavar="A,B", help="of cnn, resnet (default both)")
    add("--blocks", type=integer(1), default=12, metavar="N", help="of a layer's operand, drawn if more (default 12)")
    add("--batches", type=integer(2), default=20, metavar="N", help="that the loss is measured on (default 20)")
    add("--dithers", type=integer(1), default=4, metavar="N", help="of a block on each batch (default 4)")
    add("--bits", type=int, choices=range(2, 9), default=4, metavar="B", help="of the one block (default 4)")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--early",
        type=several(integer(2)),
        default=(60,),
        metavar="N,M,..",
        help="steps before the first looks, each at least 2 (default 60)",
    )
    add("--epochs", type=integer(1), default=3, metavar="N", help="before the last (default 3)")
    add("--images", type=integer(1), default=12000, metavar="N", help="to train on (default 12000)")
    add("--batch", type=integer(1), default=64, metavar="N", help="images of a batch (default 64)")
    add(
        *("--seeds", "--seed"),
        type=several(integer(0)),
        default=(0,),
        metavar="A,B,..",
        help="of weights, order, blocks and dithers: a training of each model for each (default 0)",
    )
    add("--jobs", type=integer(1), default=1, metavar="N", help="trainings at a time (default 1)")
    add("--threads", type=integer(1), default=1, metavar="N", help="(default 1)")
    add("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four .gz files (default: its Debian package's place)")


def _fault(options: Options) -> str:
    """What does not go together."""
    late = options.epochs * (options.images // options.batch)
    if max(options.early) >= late:
        return f"--early must be less than the {late} steps of --epochs, --images and --batch, got {max(options.early)}"
    return ""


def _model(text: str) -> str:
    if text not in MODELS:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(MODELS)}, got {text!r}")
    return text


_EPILOG = f"""\
The models of train_dynasty.py (cnn with --width 16 --depth 3, resnet with --width 16 --depth 1) train on Fashion-MNIST
as dynasty.convert makes them, at four times fewer cycles than 8 bits. Early and late in training the estimates that
the next bit map would be made from, expected squared changes of the loss by `dynasty.sensitivity`, are held against
what really happens: with all else in float32, one block is dithered to --bits bits,

  q = step * (round(x / step + u) - u),   u uniform on [-1/2, 1/2), new for each element, each time

whose error is uniform over a step whatever the values are, and the truth is the mean of (loss - loss before)^2 over
dithers and batches of images that the training has not seen. It is itself a random number. How random it is tells its
reliability: the rank correlation of halves of the batches, mean of many splits, by Spearman-Brown for all of them. A
perfect estimator can be expected to reach its root, and no more.

columns: rank correlations (Spearman; ties have their mean rank), means over the seeds
  blocks      that were measured
  estimate    with what is estimated, +- half of its 95 % confidence interval; of ten blocks of one training it says
              little: correlations of random orders have a standard deviation of a third
  error only  with the error of rounding alone: the estimate with all slopes set to 1
  step before with what the slopes on the very batches of the truth said one step of training before: how much of what
              is true now was so a step ago, and about the most that can be known when a map is made
  first order with what those slopes say now, in place of those that training saw
  truth       the truth's own reliability
rows: all blocks of all layers; activations; weights; each layer's, of both operands together and of each by itself,
  where there are {FEWEST} or more
analytics: multiply-accumulates of statistics and maps over those of the training so far, warm-up included, whose steps
  are all observed; the most of any seed

exit status
  0 for each model, early and late, in the mean over seeds: all blocks' estimate is >= {OVERALL} and above error only's,
    and each layer's, both operands together, is >= {WITHIN}, or >= the truth's reliability where that is lower; late:
    analytics are <= {ANALYTICS:.0%}
  1 something of this does not hold; 2 wrong usage, or no data

examples
  python tools/sensitivity_check.py
  python tools/sensitivity_check.py --seeds 1,2,3,4,5 --jobs 2 --early 30,60,100
  python tools/sensitivity_check.py --model cnn --blocks 64 --dithers 8 --json seen.json --plot seen.png
"""
