"""Random topologies for hypothesis: connected, with switches, links of unequal rates, one way or both."""

from __future__ import annotations

from hypothesis import strategies as st

from prove_cases import RATES as _RATES
from prove_cases import random_topology
from tasp_coll.topology import Topology

RATES = st.sampled_from(_RATES)


def topologies(ranks: int = 5, switches: int = 3, density: int = 4) -> st.SearchStrategy[Topology]:
    """Up to so many ranks and switches: a cycle through a random order of all nodes and any other links."""
    return st.randoms(use_true_random=False).map(lambda rng: random_topology(rng, ranks, switches, density))
