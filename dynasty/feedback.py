"""What quantization has lost so far, to be added to what is sent next (error feedback: Seide et al., 2014; Karimireddy
et al., 2019): over many steps nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasp_coll import ArgumentError


class Feedback:
    """The memory of one sequence of calls: of one model's gradients, say.

    A call that fails leaves it as it was. It starts anew where elements, operation, rank or number of ranks change. A
    block that held infinities or NaN leaves nothing behind.
    """

    def __init__(self) -> None:
        self._of = ""
        self._lost: Tensor | None = None

    def add(self, of: str, values: Tensor) -> None:
        """To values, what the last call lost, if it was one of this kind."""
        if self._lost is not None and of == self._of:
            values += self._lost.to(values.device).view_as(values)

    def keep(self, of: str, lost: Tensor) -> None:
        """For the next call: float32, in the call's own layout."""
        self._of, self._lost = of, lost

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint of this rank."""
        return {"of": self._of, "lost": self._lost}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The way back. Raises ArgumentError for anything else."""
        of, lost = state.get("of"), state.get("lost")
        sound = lost is None or (isinstance(lost, Tensor) and lost.dtype == torch.float32)
        if not isinstance(of, str) or "lost" not in state or not sound:
            raise ArgumentError(f"state must be what Feedback.state_dict gave, got keys {sorted(map(str, state))}")
        self._of, self._lost = of, lost
