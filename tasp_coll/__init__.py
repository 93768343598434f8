"""tasp-coll: collectives on every link you paid for.

    import tasp_coll
    out = tasp_coll.decomposed_allgather(array)      # under mpirun; rank-major along axis 0

The decomposed AllGather splits the topology into link-disjoint Hamiltonian rings and runs them at the same time.
Importing this module loads neither mpi4py, CuPy, torch nor JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ArgumentError": "errors",
    "ArgumentTypeError": "errors",
    "CollectiveError": "errors",
    "Communicator": "communicator",
    "CorruptionError": "errors",
    "Link": "links",
    "LinkWarning": "errors",
    "MismatchError": "errors",
    "PeerTimeoutError": "errors",
    "Ring": "rings",
    "Rows": "layouts",
    "Schedule": "schedule",
    "ScheduleError": "errors",
    "Topology": "topology",
    "TopologyError": "errors",
    "Transfer": "schedule",
    "all_to_all": "functions",
    "allgather_steps": "functions",
    "decompose": "decomposition",
    "decomposed_allgather": "functions",
    "decomposed_allgatherv": "functions",
    "decomposed_allreduce": "functions",
    "decomposed_reduce_scatter": "functions",
    "plan": "schedule",
    "reduce_scatter_steps": "functions",
    "ring_neighbours": "decomposition",
}
__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CollectiveError",
    "Communicator",
    "CorruptionError",
    "Link",
    "LinkWarning",
    "MismatchError",
    "PeerTimeoutError",
    "Ring",
    "Rows",
    "Schedule",
    "ScheduleError",
    "Topology",
    "TopologyError",
    "Transfer",
    "all_to_all",
    "allgather_steps",
    "decompose",
    "decomposed_allgather",
    "decomposed_allgatherv",
    "decomposed_allreduce",
    "decomposed_reduce_scatter",
    "plan",
    "reduce_scatter_steps",
    "ring_neighbours",
]

if TYPE_CHECKING:
    from tasp_coll.communicator import Communicator
    from tasp_coll.decomposition import decompose, ring_neighbours
    from tasp_coll.errors import (
        ArgumentError,
        ArgumentTypeError,
        CollectiveError,
        LinkWarning,
        MismatchError,
        PeerTimeoutError,
        ScheduleError,
        TopologyError,
    )
    from tasp_coll.functions import (
        all_to_all,
        allgather_steps,
        decomposed_allgather,
        decomposed_allgatherv,
        decomposed_allreduce,
        decomposed_reduce_scatter,
        reduce_scatter_steps,
    )
    from tasp_coll.layouts import Rows
    from tasp_coll.links import Link
    from tasp_coll.rings import Ring
    from tasp_coll.schedule import Schedule, Transfer, plan
    from tasp_coll.topology import Topology


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
