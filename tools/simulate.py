"""What collectives and attention would take on a topology, by the cost model. Needs neither MPI nor torch nor ranks.

python tools/simulate.py --topology SPEC_OR_FILE
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import simulate_model
import simulate_plot
import simulate_text
from perf_report import write_json
from simulate_options import parse
from tasp_coll import CollectiveError, __version__

TOOL = "simulate"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = parse(__doc__, argv)
    try:
        topology = simulate_model.topology_of(options)
        print("\n".join(simulate_text.head(options, topology)), flush=True)
        collectives = simulate_model.collectives(options, topology)
        if collectives:
            print("\n".join(simulate_text.collectives(collectives)), flush=True)
        attention = simulate_model.attention(options, topology)
        print("\n".join(simulate_text.attention(attention)), flush=True)
        losses = simulate_model.losses(options, topology)
        if losses:
            print("\n".join(simulate_text.losses(losses, options.faults)), flush=True)
        if options.json is not None:
            first = {"tool": TOOL, "version": __version__, "topology": topology.name, "ranks": topology.ranks}
            tables = (("collective", collectives), ("attention", attention), ("loss", losses))
            rows = [simulate_model.Row(kind, row) for kind, table in tables for row in table]
            write_json(options.json, first, rows)
        if options.plot is not None:
            simulate_plot.draw(options.plot, options, topology)
    except (CollectiveError, OSError) as error:
        print(f"{TOOL}.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
