"""The cost model of collectives, as the model of attention asks for it."""

from __future__ import annotations

from attention.forecast import Links, Travel
from tasp_coll import Topology
from tasp_coll.forecast import Case, prediction_of
from tasp_coll.simulate import LINKS_ALONE, Costs


def links_on(topology: Topology, costs: Costs = LINKS_ALONE) -> Links:
    """What collectives take on a topology, by algorithm and bytes of a shard."""

    def links(nbytes: int, algorithm: str, collective: str) -> Travel | None:
        found = prediction_of(Case(topology, collective, nbytes, costs=costs), algorithm)
        return None if found is None else Travel(found.seconds, max(len(found.steps), 1))

    return links
