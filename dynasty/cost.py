"""Cycles and energy of a bit-scalable accelerator: a model, not a measurement, and no wall-clock time.

The array multiplies b_a by b_b bits in b_a * b_b / 64 of the cycles of 8 by 8 (Bit Fusion, arXiv 1712.01507). Matrices
are cut into blocks; those at the edges take as long as full ones. Energies are those of 45 nm at 0.9 V in M. Horowitz,
"Computing's energy problem", ISSCC 2014: per 8-bit multiplication 0.2 pJ, 32-bit integer addition 0.1, float16
multiplication 1.1, float32 addition 0.9, 64 bits from 8 KB of SRAM 10, from 1 MB 100, from DRAM 1300 (the lower end).
Multipliers scale with b_a * b_b, adder trees with b_a + b_b, memory with the bits stored; sums, steps and the float32
weights cost the same at any width. Steps are integers under a power of two for each matrix (`integers`, VS-Quant), so
that what blocks sum up to is multiplied by both steps and added up as an integer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from dynasty.chip import Chip
from dynasty.integers import STEP_BITS
from dynasty.maps import Meetings, Widths
from dynasty.tiles import Block

MULTIPLY_8 = 0.2
ADD_32 = 0.1
MULTIPLY_FLOAT16, ADD_FLOAT32 = 1.1, 0.9
SRAM_BIT, BUFFER_BIT, DRAM_BIT = 10 / 64, 100 / 64, 1300 / 64
_SUM_BITS = 4  # that a sum over a block's depth has beyond its products
_TOTAL_BITS = 20 + 2 * STEP_BITS + 12  # of sums over all blocks: a block's, two steps, and 4,096 blocks
_WIDTH_BITS = 4
GEMMS = 3


@dataclass(frozen=True)
class Energy:
    """pJ: `multipliers`; `adders` (of products, within a block's depth); `scales` (each such sum times its blocks'
    steps, added up); `operands` (blocks from the SRAM beside the array); `memory` (activations, gradients
    and quantized weights with their steps and widths, to and from the chip's buffer, and what does not fit into it to
    and from DRAM); `optimizer` (float32 weights and momentum, read and written, in the same memory); `analytics`.
    """

    multipliers: float = 0.0
    adders: float = 0.0
    scales: float = 0.0
    operands: float = 0.0
    memory: float = 0.0
    optimizer: float = 0.0
    analytics: float = 0.0

    @property
    def total(self) -> float:
        """pJ in all."""
        return sum(getattr(self, part.name) for part in fields(self))

    def plus(self, other: Energy) -> Energy:
        """With another's."""
        return Energy(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Cost:
    """What training took, and what all blocks at 8 bits would have taken.

    cycles: of an array that does one 8-bit multiply-accumulate per cycle, with edges and analytics; macs: multiply-
    accumulates of the three GEMMs without edges; analytics_macs: those of statistics and maps.
    """

    steps: int = 0
    macs: float = 0.0
    analytics_macs: float = 0.0
    cycles: float = 0.0
    cycles_8bit: float = 0.0
    energy: Energy = field(default_factory=Energy)
    energy_8bit: Energy = field(default_factory=Energy)

    @property
    def speedup(self) -> float:
        """Modelled cycles of 8 bits over those taken; 1 before the first step."""
        return self.cycles_8bit / self.cycles if self.cycles else 1.0

    @property
    def energy_ratio(self) -> float:
        """Modelled energy of 8 bits over that taken."""
        return self.energy_8bit.total / self.energy.total if self.energy.total else 1.0

    @property
    def energy_pj(self) -> float:
        """In all."""
        return self.energy.total

    @property
    def energy_pj_8bit(self) -> float:
        """In all, at 8 bits."""
        return self.energy_8bit.total

    @property
    def parts(self) -> dict[str, float]:
        """pJ by part."""
        return {part.name: getattr(self.energy, part.name) for part in fields(self.energy)}

    def plus(self, other: Cost) -> Cost:
        """Both after one another."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if "energy" not in f.name}
        energies = self.energy.plus(other.energy), self.energy_8bit.plus(other.energy_8bit)
        return replace(self, **sums, energy=energies[0], energy_8bit=energies[1])


def step_cost(meetings: Meetings, widths: Widths, block: Block, chip: Chip) -> Cost:
    """Of one training step with these widths, analytics left out."""
    eights = widths.all_at(8)
    return Cost(
        steps=1,
        macs=meetings.macs,
        cycles=meetings.cycles(widths),
        cycles_8bit=meetings.cycles(eights),
        energy=_energy(meetings, widths, block, chip),
        energy_8bit=_energy(meetings, eights, block, chip),
    )


def analytics_cost(macs: float) -> Cost:
    """Of statistics and maps: of 16 bits, added up in float32, each a cycle of the array."""
    pj = macs * (MULTIPLY_FLOAT16 + ADD_FLOAT32)
    return Cost(analytics_macs=macs, cycles=macs, energy=Energy(analytics=pj))


def _energy(meetings: Meetings, widths: Widths, block: Block, chip: Chip) -> Energy:
    u, elements = meetings.u.double(), meetings.elements
    w, x, g = widths.w.double(), widths.x[meetings.x].double(), widths.g[meetings.g].double()
    spent = 64 * GEMMS * float(u.sum())  # multiply-accumulates, with edges
    product_bits = 64 * 2 * float((u * (w + x + g)).sum())
    sums, sum_bits = spent / block.columns, product_bits / block.columns + _SUM_BITS * spent / block.columns
    held = sum(float((count * bits).sum()) for count, bits in zip(elements, widths, strict=True))
    held += (STEP_BITS + _WIDTH_BITS) / block.size * elements.total
    masters = 2 * 32 * float(elements.w.sum())
    spilled = max(0.0, 1 - 8 * chip.buffer_bytes / (held + masters)) if held else 0.0
    bit = BUFFER_BIT + spilled * DRAM_BIT
    return Energy(
        multipliers=MULTIPLY_8 * meetings.cycles(widths),
        adders=ADD_32 / 32 * product_bits,
        # Two steps' product has twice their bits.
        scales=MULTIPLY_8 / 64 * 2 * STEP_BITS * sum_bits + ADD_32 / 32 * _TOTAL_BITS * sums,
        # What enters the array at one side meets all of the other.
        operands=SRAM_BIT * product_bits / chip.side,
        # Each operand is written once and read twice, by the two GEMMs that it goes into.
        memory=bit * GEMMS * held,
        optimizer=bit * 2 * masters,
    )
