"""The command line of train_dynasty.py."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf_options import Parser, integer, seconds_of, several
from tasp_coll.presets import KNOWN_SPECS
from train_dynasty_tasks import LONG, Precision, Task, precision

MODELS = ("cnn", "resnet", "llama")
DATA_SETS = ("fashion-mnist", "cifar-100", "imagenet", "text")
GRADS = ("float32", "bfloat16", "8", "dynamic")
_SETTING = (
    *("model", "width", "depth", "seq_len", "data_set", "images", "test_images"),
    *("block", "refresh", "warmup", "ramp", "storage", "epochs", "batch", "optimizer", "lr", "weight_decay"),
    "mean_bits",
)
_OBSERVED = 2  # dynasty.Config's
_LARGEST = 4096  # side of a block
_MOST_STORAGE = 1000  # dynasty.Config's
# Of each model: optimizer, rate, weight decay, --width and --depth.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cnn": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4, "width": 16, "depth": 3},
    "resnet": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "width": 16, "depth": 3},
    "llama": {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01, "width": 64, "depth": 2},
}


@dataclass(frozen=True)
class Options:
    """What the user asked for. images, test_images None: all; grad_bits None: float32, if there are several ranks."""

    model: str
    width: int
    depth: int
    seq_len: int
    data_set: str
    data: Path | None
    images: int | None
    test_images: int | None
    configs: tuple[Precision, ...]
    seeds: tuple[int, ...]
    against: str
    block: str
    refresh: int
    warmup: int
    ramp: float
    storage: float
    epochs: int
    batch: int
    optimizer: str
    lr: float
    weight_decay: float
    evals: int
    jobs: int
    threads: int
    device: str
    grad_bits: tuple[str, ...] | None
    mean_bits: float
    topology: str | None
    timeout: float | None
    json: Path | None
    resume: bool
    plot: Path | None
    checkpoint: Path | None

    def tasks(self, ranks: int) -> tuple[Task, ...]:
        """All trainings, seed by seed, so that what disturbs the machine disturbs all rows alike."""
        grads: Sequence[str | None] = (self.grad_bits or GRADS[:1]) if ranks > 1 else (None,)
        return tuple(Task(each, how, seed) for seed in self.seeds for each in self.configs for how in grads)

    def setting(self, ranks: int) -> dict[str, Any]:
        """What must be the same for runs to be compared."""
        return {**{name: getattr(self, name) for name in _SETTING}, "ranks": ranks}


def parse(about: str | None, argv: Sequence[str] | None, *, quiet: bool) -> Options:
    """Options from the command line; `--help` and bad flags end the process, without a word if `quiet`."""
    parser = _parser(about, quiet)
    given = vars(parser.parse_args(argv))
    for name, default in _DEFAULTS[given["model"]].items():
        given[name] = default if given[name] is None else given[name]
    given["data_set"] = given["data_set"] or ("text" if given["model"] == "llama" else "fashion-mnist")
    given["against"] = given["against"] or _against(given["configs"])
    options = Options(**given)
    if fault := _fault(options):
        parser.error(fault)
    return options


def _against(configs: Sequence[Precision]) -> str:
    texts = [each.text for each in configs]
    return "8" if "8" in texts else texts[0]


def _fault(options: Options) -> str:
    """What does not go together."""
    if (options.model == "llama") != (options.data_set == "text"):
        return f"--data-set text is for --model llama, and no other, got {options.data_set} and {options.model}"
    if options.model == "llama" and options.width % 32:
        return f"--width must be a multiple of 32 with --model llama, whose heads have 32, got {options.width}"
    if options.against not in [each.text for each in options.configs]:
        return f"--against must be one of --configs, got {options.against!r}"
    if options.images is not None and options.images < options.batch:
        return f"--images must be at least --batch {options.batch}, got {options.images}"
    if options.ramp >= 1:
        return f"--ramp must be below 1, got {options.ramp:g}"
    if options.storage > _MOST_STORAGE:
        return f"--storage must be at most {_MOST_STORAGE}, got {options.storage:g}"
    if options.refresh < _OBSERVED:
        return f"--refresh must be at least the {_OBSERVED} steps that are observed before it, got {options.refresh}"
    if options.resume and options.json is None:
        return "--resume needs --json PATH, whose runs it takes over"
    return ""


def _parser(about: str | None, quiet: bool) -> Parser:
    parser = Parser(
        quiet,
        prog="train_dynasty.py",
        description=about,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_model(parser.add_argument_group("what is trained"))
    _add_data(parser.add_argument_group("on what"))
    _add_rows(parser.add_argument_group("what is compared"))
    _add_training(parser.add_argument_group("how it is trained"))
    _add_ranks(parser.add_argument_group("data-parallel, under mpiexec"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", choices=MODELS, default="cnn", help="see below (default cnn)")
    group.add_argument(
        "--width", type=integer(1), metavar="N", help="channels of the first layer (16), or of llama's states (64)"
    )
    group.add_argument(
        "--depth", type=integer(1), metavar="N", help="resnet: blocks of a stage (3); llama: layers (2); cnn: convs (3)"
    )
    group.add_argument("--seq-len", type=integer(2), default=128, metavar="N", help="llama: bytes of a context (128)")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data-set", choices=DATA_SETS, help="(default: fashion-mnist; of llama: text)")
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="where its standard files are; of text: a file, whose bytes are taken (default: the Debian package's "
        "place of fashion-mnist; the standard library's sources as text)",
    )
    group.add_argument(
        "--images", type=integer(1), metavar="N", help="images, or contexts, to train on: the same for all (all)"
    )
    group.add_argument("--test-images", type=integer(1), metavar="N", help="to test on (default all)")


def _add_rows(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--configs",
        type=several(precision),
        default=several(precision)("float32,8,dynamic:4.7"),
        metavar="A,B,..",
        help="float32, equal bits such as 8, dynamic:S with S times fewer cycles than 8 bits (float32,8,dynamic:4.7)",
    )
    group.add_argument(
        "--seeds", type=several(integer(0)), default=(1,), metavar="A,B,..", help="of weights and order (default 1)"
    )
    group.add_argument("--against", metavar="CONFIG", help="the row that all are compared with (8, else the first)")
    group.add_argument(
        "--block",
        type=_block,
        default="16x16",
        metavar="RxC",
        help="rows x columns of a block, 1 to 4096 each (default 16x16)",
    )
    group.add_argument(
        "--refresh", type=integer(1), default=10, metavar="K", help="steps from one bit map to the next (default 10)"
    )
    group.add_argument(
        "--warmup", type=integer(1), default=10, metavar="K", help="first steps, all in 8 bits, of dynamic (default 10)"
    )
    group.add_argument(
        "--ramp",
        type=_number(0, True),
        default=0.0,
        metavar="R",
        help="the budget of a step grows from 1 - R to 1 + R times its mean: late steps gain most (default 0)",
    )
    group.add_argument(
        "--storage",
        type=_number(0, True),
        default=0.0,
        metavar="CYCLES",
        help="that are worth a bit less of each stored element, for less energy: 15 suits cnn and resnet (default 0)",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=integer(1), default=1, metavar="N", help="(default 1)")
    group.add_argument("--batch", type=integer(1), default=64, metavar="N", help="of all ranks together (default 64)")
    group.add_argument("--optimizer", choices=("sgd", "adamw"), help="sgd has momentum 0.9 (default; of llama adamw)")
    group.add_argument(
        "--lr", type=_number(0), metavar="RATE", help="highest; a cosine leads to 0 (cnn 0.05, resnet 0.1, llama 0.003)"
    )
    group.add_argument("--weight-decay", type=_number(0, True), metavar="W", help="(default 5e-4; of llama 0.01)")
    group.add_argument(
        "--evals", type=integer(1), default=8, metavar="N", help="tests on the way, on 1000 images; the last on all (8)"
    )
    group.add_argument("--jobs", type=integer(1), default=1, metavar="N", help="trainings at a time (default 1)")
    group.add_argument("--threads", type=integer(1), default=1, metavar="N", help="of each training (default 1)")
    group.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where a single process trains (default cpu)"
    )


def _add_ranks(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--grad-bits",
        type=several(_one_of(GRADS)),
        metavar="A,B,..",
        help=f"how gradients travel, a row each: {', '.join(GRADS)} (default float32)",
    )
    group.add_argument(
        "--mean-bits", type=_number(0), default=4.0, metavar="B", help="of gradients sent as dynamic (default 4)"
    )
    group.add_argument(
        "--topology",
        metavar="SPEC",
        help="a preset or a topology file (default: what TASP_COLL_TOPOLOGY names, else a full mesh)",
    )
    group.add_argument(
        "--timeout", type=seconds_of, metavar="S", help="seconds without an answer from other ranks that end the job"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-J", "--json", type=Path, metavar="PATH", help="write all runs, after each")
    group.add_argument("--resume", action="store_true", help="keep the runs that --json has, and do the others")
    group.add_argument("--plot", type=Path, metavar="PATH", help="draw four panels, as .png, .svg or .pdf")
    group.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="write each trained model there, maps and statistics with it"
    )


def _block(text: str) -> str:
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text, re.ASCII)
    if not found or not all(1 <= int(side) <= _LARGEST for side in found.groups()):
        raise argparse.ArgumentTypeError(f"must be RxC, each from 1 to {_LARGEST}, got {text!r}")
    return text


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(names)}, got {text!r}")
        return text

    return checked


def _number(low: float, with_low: bool = False) -> Callable[[str], float]:
    """The type of a number above `low`, or from it on."""

    def checked(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (low < number < math.inf or (with_low and number == low)):
            raise argparse.ArgumentTypeError(f"must be a number {'>=' if with_low else '>'} {low:g}, got {text!r}")
        return number

    return checked


_EPILOG = f"""\
models
  cnn      --depth convolutions of 3x3, each twice as wide as the one before, ReLU, pooling; two linear layers
  resnet   basic blocks with BatchNorm: 3 stages for small images (ResNet-20 with --depth 3), a stem of 7x7 and 4 stages
           for ImageNet's (ResNet-18 with --width 64 --depth 2)
  llama    a small Llama of transformers, which predicts the next byte
  With the same seed all rows begin with the same weights and see the same images in the same order: they are paired.

data sets, none of which is downloaded
  fashion-mnist  Debian's package dataset-fashion-mnist, or its four standard idx .gz files in --data DIR
  cifar-100      the *binary* version: cifar-100-binary.tar.gz, or its train.bin and test.bin, in --data DIR
  imagenet       train/<wnid>/*.JPEG and val/<wnid>/*.JPEG in --data DIR; read as they are needed, by Pillow
  text           the bytes of --data FILE; the last tenth is held out, and a loss is in nats per byte

columns: means over the seeds, +- half of the 95 % confidence interval (Student's t)
  accuracy  % of held-out images, or of bytes that were predicted, after training; diff: minus the row of --against,
            seed by seed, in points
  loss      held-out, cross-entropy in nats; diff: the same of the losses
  bits      mean width of activations/weights/gradients, over the steps after the warm-up
  speed     modelled cycles of a training all in 8 bits over modelled cycles of this one, analytics included: those of a
            bit-scalable array. It is no wall-clock time: this machine computes in float32 whatever the widths
  energy    modelled energy of a training all in 8 bits over this one's, everything included
  changed   % of blocks whose width changed at a refresh, mean and highest, from the second map after the warm-up on
  analytics % of a step's multiply-accumulates that the sensitivities take
  diverged  runs whose loss ended up not finite, or stayed at its start for {LONG} steps: the text below says which

under mpiexec each rank computes its share of every batch; gradients are averaged by dynasty.all_reduce in each of the
  ways of --grad-bits: bytes that a rank sends in a step, float32's over these, and seconds of a step and of its
  exchange, packing included (median; a step takes as long as on the slowest rank). Here fewer bits are real seconds.

files
  --json   {{"tool", "version", "setting", "results": [{{"config", "grads", "seed", "accuracy", "loss", "diverged",
           "cost", "history", "maps", ..}}]}}, written anew after each run: what was cut off goes on with --resume
  --checkpoint  DIR/CONFIG[-GRADS]-seedN.safetensors: state_dict() of the model that dynasty.convert made, its
           controller's included, and the setting as metadata

exit status
  0 all is well (a run that diverged is a result); 1 a run failed; 2 the command line or what it asks for is not
  possible here

examples
  python tools/train_dynasty.py --images 12000
  python tools/train_dynasty.py --images 12000 --configs float32,8,6,4,3,dynamic:4.0,dynamic:4.7 --seeds 1,2,3,4,5 \\
      --jobs 2 --json fashion.json --plot fashion.png
  python tools/train_dynasty.py --model llama --images 2000 --batch 16 --configs float32,8,4,dynamic:4.7
  mpiexec -n 4 python tools/train_dynasty.py --images 12000 --configs 8 --grad-bits float32,bfloat16,8,dynamic
  python tools/train_dynasty.py --model resnet --data-set cifar-100 --data cifar --epochs 160 --batch 128 \\
      --configs float32,8,4,dynamic:5.1 --seeds 1,2,3 --device cuda --json cifar.json   # the paper's kind of experiment

presets of --topology
{KNOWN_SPECS}
"""
