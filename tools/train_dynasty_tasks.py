"""What train_dynasty.py compares: how a model computes, how its gradients travel, from which seed."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

TOOL = "train_dynasty"
WIDTHS = range(2, 9)  # bits of an equal precision
FASTEST = 16  # times 8 bits: all in 2
LONG = 100  # steps with the loss at its start that are called a divergence
_DYNAMIC = re.compile(r"dynamic:(\d{1,3}(?:\.\d{1,6})?)", re.ASCII)


@dataclass(frozen=True)
class Precision:
    """How a model computes, as `text` says it. bits: of an equal precision; speedup: of a dynamic one over 8 bits."""

    text: str
    method: str
    bits: int | None = None
    speedup: float | None = None

    def config(self, **others: Any) -> Any:
        """As dynasty.Config; others: what it takes besides."""
        import dynasty

        asked = {"bits": self.bits, "speedup": self.speedup}
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return dynasty.Config(method=self.method, **given, **others)


@dataclass(frozen=True)
class Task:
    """One training. grads: how gradients travel between ranks; None where there is one."""

    precision: Precision
    grads: str | None
    seed: int

    @property
    def row(self) -> tuple[str, str | None]:
        """What is the same over seeds."""
        return self.precision.text, self.grads

    def __str__(self) -> str:
        return f"{self.precision.text} {f'grads {self.grads} ' if self.grads else ''}seed {self.seed}"


def precision(text: str) -> Precision:
    """The type of one of --configs."""
    if text == "float32":
        return Precision(text, "float32")
    if text.isdecimal() and text.isascii() and len(text) == 1 and int(text) in WIDTHS:
        return Precision(text, "equal", bits=int(text))
    if (found := _DYNAMIC.fullmatch(text)) and 1 <= float(found[1]) <= FASTEST:
        return Precision(text, "dynamic", speedup=float(found[1]))
    raise argparse.ArgumentTypeError(
        f"must be float32, bits from 2 to 8, or dynamic:S with S from 1 to 16, got {text!r}"
    )
