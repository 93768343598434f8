"""The command line of train_lm.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attention_options import kv_bits
from perf_options import Parser, integer, seconds_of
from tasp_coll.presets import KNOWN_SPECS

DTYPES = ("float32", "bfloat16", "float64")
METHODS = ("auto", "tasp", "ring", "allgather", "ulysses")
SHAPE = {"width": 128, "depth": 4, "heads": 4, "kv_heads": None, "window": None}  # what a checkpoint settles


@dataclass(frozen=True)
class Options:
    """What the user asked for. `kv_heads` None: as many as heads; `window` None: the whole context."""

    text: Path | None
    seq_len: int
    batch: int
    steps: int
    width: int
    depth: int
    heads: int
    kv_heads: int | None
    window: int | None
    dtype: str
    lr: float
    warmup: int
    seed: int
    method: str
    kv_bits: int | str | None
    topology: str | None
    timeout: float | None
    save: Path | None
    save_every: int | None
    resume: Path | None
    json: Path | None
    plot: Path | None


def parse(about: str | None, argv: Sequence[str] | None, *, quiet: bool) -> Options:
    """Options from the command line; `--help` and bad flags end the process, without a word if `quiet`."""
    parser = _parser(about, quiet)
    given = vars(parser.parse_args(argv))
    for name, default in SHAPE.items():
        if given[name] is None:
            given[name] = default
        elif given["resume"] is not None:
            parser.error(f"--{name.replace('_', '-')} comes from the checkpoint of --resume: leave it out")
    options = Options(**given)
    if options.width % options.heads or options.width // options.heads % 2:
        parser.error(f"--width must be an even multiple of --heads, got {options.width} and {options.heads}")
    if options.heads % (options.kv_heads or options.heads):
        parser.error(f"--heads must be a multiple of --kv-heads, got {options.heads} and {options.kv_heads}")
    if options.kv_bits is not None and options.method == "ulysses":
        parser.error("--kv-bits is not for --method ulysses")
    if options.save_every is not None and options.save is None:
        parser.error("--save-every needs --save DIR")
    return options


def _parser(about: str | None, quiet: bool) -> Parser:
    parser = Parser(
        quiet,
        prog="train_lm.py",
        description=about,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_data(parser.add_argument_group("what is learnt"))
    _add_model(parser.add_argument_group("the model, of random weights or of --resume"))
    _add_training(parser.add_argument_group("how it is trained"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--text", type=Path, metavar="PATH", help="its bytes are the tokens (default: the standard library's sources)"
    )
    group.add_argument(
        "--seq-len", type=integer(2), default=1024, metavar="N", help="tokens of a context, over all ranks (1024)"
    )
    group.add_argument("--batch", type=integer(1), default=1, metavar="N", help="contexts in a step (default 1)")


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--width", type=integer(2), metavar="N", help="of the hidden states (default 128)")
    group.add_argument("--depth", type=integer(1), metavar="N", help="layers (default 4)")
    group.add_argument("--heads", type=integer(1), metavar="N", help="of queries (default 4)")
    group.add_argument("--kv-heads", type=integer(1), metavar="N", help="of keys and values (default: --heads)")
    group.add_argument(
        "--window",
        type=integer(1),
        metavar="W",
        help="a token sees the W latest, itself among them (default: all before it). Makes a Mistral, else a Llama",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=integer(1), default=50, metavar="N", help="in this run (default 50)")
    group.add_argument("--lr", type=_rate, default=3e-3, metavar="RATE", help="of AdamW (default 0.003)")
    group.add_argument("--warmup", type=integer(0), default=10, metavar="N", help="steps up to the rate (default 10)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="bfloat16 computes in it and keeps float32 weights"
    )
    group.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of weights and contexts (default 0)")
    group.add_argument("--method", choices=METHODS, default="auto", help="of attention (default auto)")
    group.add_argument(
        "--kv-bits",
        type=kv_bits,
        metavar="BITS",
        help="with which keys and values travel: none (as they are, the default), 2 to 8, dynamic, or dynamic:MEAN",
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
    group.add_argument("--save", type=Path, metavar="DIR", help="write a checkpoint at the end")
    group.add_argument("--save-every", type=integer(1), metavar="N", help="and every N steps")
    group.add_argument("--resume", type=Path, metavar="DIR", help="go on from a checkpoint, --steps more")
    group.add_argument("-J", "--json", type=Path, metavar="PATH", help="write every step's figures, unrounded")
    group.add_argument("--plot", type=Path, metavar="PATH", help="draw loss over steps, as .png, .svg or .pdf")


def _rate(text: str) -> float:
    """A learning rate."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return rate


_EPILOG = f"""\
The ranks split each context, not the batch: with n ranks each holds 1/n of the tokens, of the activations and of the
attention. Every rank has all weights, and the summed gradients are those of a single process. With the same seed a run
shows the same losses on any number of ranks, up to rounding.

columns
  step     counted over all runs of a checkpoint
  loss     mean over all tokens of the step, in nats per byte; untrained, ln(256) = 5.55
  norm     of all gradients, before they are clipped to 1
  tokens/s of all ranks together, in this step

files
  --save   config.json and model.safetensors, which LlamaForCausalLM.from_pretrained(DIR) loads anywhere (with --window
           MistralForCausalLM; AutoModelForCausalLM either), and training.safetensors, which --resume needs besides
  --json   {{"tool", "version", "world_size", "transport", "topology", "model", "results": [{{"step", "loss",
           "gradient_norm", "seconds", "tokens_per_second"}}]}}; model has parameters, seq_len, batch, dtype, method
           and kv_bits

exit status
  0 all is well; 1 a call failed; 2 the command line or what it asks for is not possible here

examples
  mpiexec -n 4 python tools/train_lm.py
  mpiexec -n 4 python tools/train_lm.py --seq-len 4096 --steps 200 --plot loss.png --save checkpoint
  mpiexec -n 4 python tools/train_lm.py --seq-len 4096 --resume checkpoint --save checkpoint
  mpiexec -n 8 python tools/train_lm.py --text book.txt --seq-len 32768 --window 1024 --heads 8 --kv-heads 2

presets of --topology
{KNOWN_SPECS}
"""
