"""Before a key moves: all ranks say what they were called with, and go on only if it fits together.

One small message between each pair of ranks carries a digest of the call, this rank's tokens, and whether its own
arguments are in order. Only if something is wrong a second round brings the words, so that every rank can say which is
the odd one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasp_coll import ArgumentError, CollectiveError, MismatchError

_DIGEST = 16
_FIELDS = 3  # tokens, and two figures of the caller's


class Agreed:
    """What all ranks said: `tokens` of each, and rank 0's `figures`."""

    def __init__(self, tokens: tuple[int, ...], figures: tuple[float, float]) -> None:
        self.tokens, self.figures = tokens, figures


def agree(
    comm: Any,
    call: str,
    described: dict[str, object],
    error: CollectiveError | None = None,
    tokens: int = 0,
    figures: tuple[float, float] = (0.0, 0.0),
) -> Agreed:
    """Collective. described: what must be the same on all ranks, in words.

    Raises the error itself if all ranks have the same one, else MismatchError on every rank, if one has an error or the
    descriptions differ.
    """
    text = json.dumps({"error": str(error)} if error else described, default=str)
    header = np.zeros(1 + _DIGEST + 8 * _FIELDS, np.uint8)
    header[0] = error is not None
    header[1 : 1 + _DIGEST] = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=_DIGEST).digest(), np.uint8)
    header[1 + _DIGEST :] = np.array([tokens, *figures], np.float64).view(np.uint8)
    headers = comm.decomposed_allgather(header[None])
    if headers[:, 0].any() or (headers[:, : 1 + _DIGEST] != headers[0, : 1 + _DIGEST]).any():
        _differ(comm, call, text, error)
    said = np.ascontiguousarray(headers[:, 1 + _DIGEST :]).view(np.float64)
    return Agreed(tuple(int(count) for count in said[:, 0]), (float(said[0, 1]), float(said[0, 2])))


def _differ(comm: Any, call: str, text: str, error: CollectiveError | None) -> None:
    """The second round: what each rank said."""
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = comm.decomposed_allgather(np.array([len(mine)]))
    gathered: NDArray[np.uint8] = comm.decomposed_allgatherv(mine)
    texts = [bytes(part).decode() for part in np.split(gathered, np.cumsum(lengths)[:-1])]
    if error is not None and len(set(texts)) == 1:
        raise error
    told = [json.loads(text) for text in texts]
    sound = Counter(text for text, said in zip(texts, told, strict=True) if "error" not in said)
    usual = json.loads(sound.most_common(1)[0][0]) if sound else {}
    odd = {rank: _odd(said, usual) for rank, said in enumerate(told) if said != usual}
    words = "; ".join(f"rank {rank} {why}" for rank, why in odd.items())
    named = (name for name in usual if any(f"{name}=" in why for why in odd.values()))
    rest = ", ".join(f"{name}={usual[name]}" for name in named)
    raise MismatchError(f"{call}: {words}" + (f", where others passed {rest}" if rest else ""), odd)


def _odd(said: dict[str, object], usual: dict[str, object]) -> str:
    if "error" in said:
        return f"was called with a bad argument: {said['error']}"
    differing = (name for name in said if said.get(name) != usual.get(name))
    return "passed " + ", ".join(f"{name}={said[name]}" for name in differing)


def refuse(argument: str, rule: str, came: object) -> ArgumentError:
    """The error for an argument that breaks a rule."""
    return ArgumentError(f"{argument} must {rule}, got {came}")
