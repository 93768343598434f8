"""The figures of the TASP paper (arXiv 2509.26541), its authors' configurations, and what is assumed of machines.

The configurations are those of the authors' public test scripts (github.com/infinigence/HamiltonAttention).
"""

from __future__ import annotations

from dataclasses import dataclass

from attention.forecast import Device

LENGTHS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # times BASE tokens
BATCHES = LENGTHS
BASE = 3360
MOST_TOKENS = 10_000_000  # of length times batch
HEADS, HEAD_DIM, ITEMSIZE = 20, 64, 2


@dataclass(frozen=True)
class Machine:
    """topology: a preset. device: its kernels; the cost of a step is fitted. capped: whether what one send gets of a
    rank's port is less than the port, which is fitted too."""

    topology: str
    device: Device
    capped: bool


# FlashAttention-2 forward, head_dim 64, long sequences: about 330 TFLOP/s on H100 SXM (arXiv 2407.08608, figure 5).
# On MI300X no figure for head_dim 64 is known to us: 280, by the ratio of what the kernels reach with head_dim 128.
_H100 = Device(330e12, half=300, memory_GBps=3350)
_MI300X = Device(280e12, half=300, memory_GBps=5300)
H100 = Machine("nvswitch:8", _H100, True)
H100_2 = Machine("dgx_h100:2", _H100, False)
H100_4 = Machine("dgx_h100:4", _H100, False)
MI300X = Machine("mi300x", _MI300X, False)


@dataclass(frozen=True)
class Figure:
    """A figure of the paper: TASP's speedup over ring attention, zigzag where causal.

    statistic: "average" or "best" over the configurations. rings: "all" ("rings" of the topology) or "mesh" (those of
    the full mesh of all ranks, whatever the links between them). fitted: a parameter is fitted to it.
    """

    name: str
    machine: Machine
    causal: bool
    statistic: str
    speedup: float
    rings: str = "all"
    fitted: str = ""


FIGURES = (
    Figure("H100, 1 node, full, average", H100, False, "average", 1.05),
    Figure("H100, 1 node, full, best", H100, False, "best", 2.31, fitted="send_share"),
    Figure("H100, 1 node, causal, average", H100, True, "average", 1.08),
    Figure("H100, 1 node, causal, best", H100, True, "best", 2.25),
    Figure("MI300X, full, average", MI300X, False, "average", 1.57),
    Figure("MI300X, full, best", MI300X, False, "best", 3.58, fitted="step_us"),
    Figure("MI300X, causal, average", MI300X, True, "average", 1.68),
    Figure("MI300X, causal, best", MI300X, True, "best", 3.58),
    Figure("H100, 2 nodes, full, K_8x2, average", H100_2, False, "average", 1.43, rings="mesh"),
    Figure("H100, 2 nodes, full, (8-K8-8)^2, average", H100_2, False, "average", 1.20),
    Figure("H100, 4 nodes, full, K_8x4, average", H100_4, False, "average", 1.27, rings="mesh"),
    Figure("H100, 4 nodes, full, (8-K8-8)^4, average", H100_4, False, "average", 1.20),
)
# MI300X, full, batch 48: tokens, CCR, speedup.
OVER_CCR = ((10_000, 0.39, 2.4), (20_000, 0.65, 1.8), (40_000, 0.80, 1.5), (50_000, 0.98, 1.3), (100_000, 1.17, 1.1))
CCR_BATCH = 48

ASSUMPTIONS = """\
assumed
  Rates: NVLink 450 GB/s a port each way, NIC 50 GB/s, Infinity Fabric 64 GB/s a link: vendors' data sheets, as in
  tasp_coll/presets.py. Kernels: FlashAttention-2 forward with head_dim 64, 330 TFLOP/s on H100 (arXiv 2407.08608,
  figure 5) and 280 on MI300X (ours: no public figure is known to us), half of that with blocks of 300 tokens. Merging
  moves 10 bytes an element at the memory's data sheet rate. Forward, bfloat16, 20 heads of 64, as many of keys.
  Configurations: lengths and batches of {1..128} x 3360 tokens, up to 10 million tokens in all, which is what the
  authors' scripts run; which of them the paper averages is not known to us, so all count alike.
  A single ring over nodes crosses one NIC of each node, each way, at every step."""

# By what a row's name has in it.
EXPLANATIONS = {
    "CCR itself": "kernels and links at constant rates let CCR grow as fast as the sequence; the paper's grows "
    "threefold over a tenfold length, which neither rates nor the cost of a step explain: the speedups at the paper's "
    "CCR do fit",
    "causal, best": "causal halves the computation, not the transfers, so by the model its best exceeds that of full "
    "masks; the paper's does not. Zigzag calls a kernel twice a step where full masks call it once, and the model's "
    "cost of a step is the same for both",
    "MI300X, full, average": "which configurations the paper averages is not known; those that compute long, where "
    "nothing can be won, are most of the authors' grid",
    "-K8-": "by the links two-level rings win far more than the rings of the full mesh, since a shard crosses a NIC "
    "1.9 and not 8 times on two nodes; the paper sees less and names batched sends, which NCCL serves worse than its "
    "AllToAll. The model knows links, not kernels that send",
}
