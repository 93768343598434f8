"""The command lines of all tools: what their parsers take, as `argparse` knows it, and what they must answer."""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from random import Random
from typing import Any, NoReturn
from unittest.mock import patch

import attention_curve
import attention_options
import attention_steps_perf
import break_links_options
import break_peers
import break_ranks
import compressed_perf
import discover_topology
import doctor
import fuzz_grammar
import fuzz_mutate
import fuzz_options
import gpu_report
import model_check
import paper_tables
import perf_options
import prove_options
import sensitivity_options
import show_plan
import simulate_options
import soak
import train_dynasty_options
import train_lm_options
import train_step_perf
import vcluster_options

Parse = Callable[[Sequence[str]], Any]
# Every tool that people run, with what reads its command line; nothing is run.
TOOLS: dict[str, Parse] = {
    "all_gather_perf": lambda argv: perf_options.parse("all_gather_perf", None, argv, quiet=False),
    "all_reduce_perf": lambda argv: perf_options.parse("all_reduce_perf", None, argv, quiet=False),
    "attention_curve": lambda argv: attention_curve.parser().parse_args(argv),
    "attention_perf": lambda argv: attention_options.parse(None, argv, quiet=False),
    "attention_steps_perf": lambda argv: attention_steps_perf.parser().parse_args(argv),
    "break_links": lambda argv: break_links_options.parse("break_links", None, argv),
    "break_peers": lambda argv: break_peers.parser().parse_args(argv),
    "break_ranks": lambda argv: break_ranks.parser().parse_args(argv),
    "compressed_perf": lambda argv: compressed_perf.parse(argv, quiet=False),
    "discover_topology": lambda argv: discover_topology.parser().parse_args(argv),
    "doctor": lambda argv: doctor.parser().parse_args(argv),
    "fuzz": fuzz_options.parse,
    "gpu_report": lambda argv: gpu_report.parser().parse_args(argv),
    "model_check": lambda argv: model_check.parser().parse_args(argv),
    "paper_tables": lambda argv: paper_tables.parser().parse_args(argv),
    "prove": prove_options.parse,
    "reduce_scatter_perf": lambda argv: perf_options.parse("reduce_scatter_perf", None, argv, quiet=False),
    "sensitivity_check": sensitivity_options.parse,
    "show_plan": lambda argv: show_plan.parser().parse_args(argv),
    "simulate": lambda argv: simulate_options.parse(None, argv),
    "soak": lambda argv: soak.parse(argv, quiet=False),
    "train_dynasty": lambda argv: train_dynasty_options.parse(None, argv, quiet=False),
    "train_lm": lambda argv: train_lm_options.parse(None, argv, quiet=False),
    "train_step_perf": lambda argv: train_step_perf.parse(argv, quiet=False),
    "virtual_cluster": vcluster_options.parse,
}
_NUMBERS = ("1", "2", "3", "8", "64", "1000", "0", "1K", "64K", "1.5M", "2G", "0.5", "1e3", "-1", "9" * 30, "nan")
_OTHERS = (
    *(
        "a.json",
        "a.png",
        "x/y.svg",
        "/",
        "",
        ".",
        "rings,ring",
        "auto,auto",
        "tasp,ring",
        "0:1",
        "0:fabric:0.1",
        "0,4,7",
    ),
    *("net.ipv4.tcp_no_metrics_save=1", "c1", "down", "-", "--", "\udcff", "ü" * 99, "x" * 5000),
)


class WrongAnswerError(Exception):
    """A command line was refused in another way than argparse's, or without a word."""


class _FoundError(Exception):
    pass


@cache
def flags(tool: str) -> tuple[argparse.Action, ...]:
    """All arguments of a tool, those of its actions too."""
    found: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        found.append(parser)
        raise _FoundError

    with patch.object(argparse.ArgumentParser, "parse_args", stop), suppress(_FoundError):
        TOOLS[tool]([])
    actions = []
    while found:
        for action in found.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()
            actions.append(action)
    return tuple(actions)


def command_line(rng: Random) -> tuple[str, list[str]]:
    """A tool and its arguments: those that it has, with values that could be meant, and what typing makes of them."""
    tool = rng.choice(list(TOOLS))
    known = flags(tool)
    given: list[str] = []
    for action in rng.sample(known, min(len(known), rng.randrange(5))):
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)) and rng.random() < 0.95:
            continue
        if action.option_strings:
            given.append(rng.choice(action.option_strings))
        if action.nargs != 0:
            given.append(_value(rng, action))
    if tool == "virtual_cluster":
        given.insert(0, rng.choice(("run", "up", "down", "list", "exec", "fault")))
        given += rng.choice(([], ["--", "python", "x.py"]))
    elif tool == "simulate" and rng.random() < 0.8:
        given += ["--topology", fuzz_grammar.spec(rng)]
    if given and rng.random() < 0.5:
        at = rng.randrange(len(given))
        given[at] = fuzz_mutate.text_of(rng, given[at])
    if given and rng.random() < 0.1:
        given.insert(rng.randrange(len(given)), rng.choice((*_NUMBERS, *_OTHERS)))
    return tool, [text.replace("\0", "") for text in given]  # which no command line can hold


def _value(rng: Random, action: argparse.Action) -> str:
    if action.choices and rng.random() < 0.8:
        return str(rng.choice(list(action.choices)))
    kind = rng.randrange(5)
    if action.metavar == "SPEC" and kind < 3:
        return fuzz_grammar.spec(rng)
    if kind == 0 and (words := re.findall(r"[a-z][a-z0-9_-]+", action.help or "")):
        return ",".join(rng.sample(words, min(len(words), rng.randrange(1, 4))))
    return rng.choice(_NUMBERS if kind < 4 else _OTHERS)


def parse(given: tuple[str, list[str]]) -> bool:
    """Whether a tool takes a command line; WrongAnswerError unless it refuses as argparse does, naming an argument."""
    tool, argv = given
    out, told = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(told):
            TOOLS[tool](argv)
    except SystemExit as left:
        if left.code in (None, 0):
            return True
        check_refusal(tool, left.code, told.getvalue())
        return False
    return True


def check_refusal(tool: str, status: object, told: str) -> None:
    """WrongAnswerError unless it is status 2 with one message that names an argument of the tool."""
    message = told.partition("error: ")[2]
    names = [name for action in flags(tool) for name in (*action.option_strings, str(action.metavar), action.dest)]
    if status != 2 or not message or not any(name in message for name in (*names, "argument", "COMMAND", "amount")):
        raise WrongAnswerError(f"{tool}.py left with {status!r} and said {told[-500:]!r}")
