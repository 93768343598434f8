"""The command line of virtual_cluster.py, and its help."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

from tasp_coll.presets import KNOWN_SPECS
from tasp_coll.topology import ENVIRONMENT

FAILED = 125
FAULTS = ("down", "up", "slower", "lossy", "delayed")

ABOUT = """\
A cluster on one machine: network namespaces are its hosts, shaped virtual cables its links, and TCP over them is real.
Any topology can be built, and one MPI rank runs on each host."""

EXAMPLES = f"""\
examples
  %(prog)s run --topology full_mesh:8 --link-mbit 10 -- python tools/all_gather_perf.py -b 4M -e 4M
      8 hosts, a 10 Mbit/s link between every two; one rank on each runs the command, and then all is gone
  %(prog)s run --topology cluster:2x4 --link-mbit 180 -- python my_script.py
      2 nodes of 4: links of 180 Mbit/s inside a node, and a ninth of that, 20 Mbit/s, for every NIC
  %(prog)s run --topology my_box.json --link-mbit 50 --latency-scale 100 -- python my_script.py
      a topology file of your own, its latency_us times 100
  %(prog)s run --topology full_mesh:4 --link-mbit 50 -- sh -c 'ip -brief address; ip route'
      see what a host has

  %(prog)s up --topology torus:4x4 --link-mbit 20 --name t      the cluster stays until it is taken down
  %(prog)s run --on t -- python my_script.py                   ranks on it
  %(prog)s exec --on t 3 -- bash                               a shell on host 3
  %(prog)s fault --on t 0 1 slower 4                           the link between 0 and 1, a quarter of its rate
  %(prog)s list
  %(prog)s down t

  %(prog)s fault 0 3 down                  both directions drop all; data waits, connections stay
  %(prog)s fault 0 3 lossy 2 --one-way     of what 0 sends to 3, 2 %% are lost
  %(prog)s fault 5 fabric delayed 20       rank 5's NIC: 20 ms more, each way
  %(prog)s fault 0 3 delayed 20 --jitter 10
      each packet 10 to 30 ms more, none before one that was sent earlier
  %(prog)s fault 0 3 up                    as new

what is built
  Rank r is the namespace r<r> with an address of its own, a switch a namespace with a bridge (or, where switches are
  linked to each other, one that forwards by routes). A link is a veth pair with a shaper (tc tbf) at each end, a NIC a
  cable to a fabric's bridge. The fastest link of the topology gets --link-mbit, the others their share; a latency_us is
  a delay: tc netem, or on kernels without it a process for each direction, which holds what arrives (AF_PACKET) and
  hands it on when it is due (TAP). What such a process holds when a fault of its direction changes is lost.
  Ranks that are not neighbours reach each other through those between, exactly on the way that Topology.path says.
  Where links run one way only, the cable's other direction has the same rate and no route uses it: what is
  acknowledged returns by the topology's other links.

what ranks find
  {ENVIRONMENT} names a file with the topology and the rates that its links really deliver, in GB/s of payload.
  They are measured before the command starts: TCP streams over up to three links of each nominal rate, whose median all
  links of that rate get; --goodput states them instead, as a share of the nominal rate. MPICH's settings for TCP
  between hosts are in the environment; yours win. `python` is the one that runs this tool, with its mpiexec.

what can be trusted
  What the cores carry: every byte on every link is work for them. The frames grow with the rate (--mtu), so that two
  cores carry 56 links of 100 Mbit/s; where the links' rates add up to more, the cores are what is measured. Other work
  on the machine shows too. What an idle link may send at once (--burst-ms, two packets at least) is a gift: 5 ms to a
  collective of 400. Congestion control is reno, and little of a socket's data waits in a link's queue, where it would
  hold up acknowledgements; both can be changed with --kernel.

needs Linux, iproute2 (ip, tc, bridge), util-linux (unshare, nsenter), MPICH's mpiexec; root, or a machine that lets
users have namespaces of their own. Everything is in a process namespace and a mount namespace of its own, that the
kernel clears away when the runner ends, however it ends.

exit status
  run, exec: the command's own; 128 + the signal's number where a signal ended it. {FAILED}: the cluster could not be
  built, on this machine or as asked; the message says what is missing. 2: wrong usage

presets of --topology
{KNOWN_SPECS.replace("%", "%%")}
"""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What was asked for, and the command after "--". Wrong usage ends the process with status 2."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    command = list(argv[cut + 1 :])
    parser = _parser()
    asked = parser.parse_args(argv[:cut])
    if (asked.action in ("run", "exec")) != bool(command):
        parser.error(f"{asked.action} needs -- COMMAND" if not command else f"{asked.action} takes no COMMAND")
    if asked.action == "run" and (asked.topology is None) == (asked.on is None):
        parser.error("run needs either --topology, for a new cluster, or --on, for one that is up")
    if asked.action in ("run", "up") and asked.topology and asked.link_mbit is None:
        parser.error("--topology needs --link-mbit, the rate of its fastest link")
    if asked.action == "down" and bool(asked.names) == asked.all:
        parser.error("down needs names of clusters, or --all")
    if asked.action == "fault" and asked.jitter and asked.fault != "delayed":
        parser.error(f"{asked.fault} takes no --jitter: only delayed does")
    if asked.action == "fault" and (asked.amount is None) != (asked.fault in ("up", "down")):
        parser.error(f"{asked.fault} takes {'no' if asked.amount is not None else 'an'} amount: see --help")
    return asked, command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="virtual_cluster.py",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, about: str, usage: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=about, description=about, usage=f"virtual_cluster.py {name} {usage}")

    run = action("run", "build a cluster, run a command on every host, clear all away", "[options] -- COMMAND...")
    _add_cluster(run)
    run.add_argument("--on", metavar="NAME", help="use this cluster, which is up, instead of a new one")
    _add_cluster(action("up", "build a cluster that stays", "[options]"))
    down = action("down", "end clusters and all that runs on them", "NAME... | --all")
    down.add_argument("names", nargs="*", metavar="NAME")
    down.add_argument("--all", action="store_true", help="all of this user's")
    action("list", "show clusters, and the faults of their links", "")
    inside = action("exec", "run a command on one host", "[--on NAME] RANK -- COMMAND...")
    _add_on(inside)
    inside.add_argument("rank", type=int, metavar="RANK")
    fault = action(
        "fault", "change a live link", f"[--on NAME] A B {{{','.join(FAULTS)}}} [AMOUNT] [--jitter MS] [--one-way]"
    )
    _add_on(fault)
    for end in ("a", "b"):
        fault.add_argument(end, metavar=end.upper(), help="a rank, or a switch's name")
    fault.add_argument("fault", choices=FAULTS, help="up: as new; the others add up")
    fault.add_argument(
        "amount", nargs="?", type=_number(0), help="slower: by this factor; lossy: %% of packets; delayed: ms"
    )
    fault.add_argument("--jitter", type=_number(0), default=0.0, metavar="MS", help="delayed: so much more or less")
    fault.add_argument("--one-way", action="store_true", help="only what A sends to B")
    return parser


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--topology", metavar="SPEC", required=parser.prog.endswith("up"), help="a preset, or a topology file")
    add("--link-mbit", type=_number(0), metavar="R", help="nominal rate of the fastest link, in Mbit/s")
    add("--latency-scale", type=_number(0), default=1.0, metavar="S", help="factor for latency_us (default 1)")
    add("--mtu", type=int, metavar="BYTES", help="largest IP packet (default: 160 per Mbit/s, in 4000..60000)")
    add("--burst-ms", type=_number(0), default=5.0, metavar="MS", help="what an idle link may send at once (default 5)")
    add("--queue-ms", type=_number(0), default=50.0, metavar="MS", help="how long packets may queue (default 50)")
    add(
        "--kernel",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="a sysctl of the hosts, such as net.ipv4.tcp_congestion_control=reno; repeatable",
    )
    add("--goodput", type=_number(0), metavar="SHARE", help="do not measure: links deliver this share of their rate")
    add("--name", metavar="NAME", help="what the cluster is called (default: the next free of c1, c2, ...)")
    add("-q", "--quiet", action="store_true", help="say nothing but errors")


def _add_on(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--on", metavar="NAME", help="which cluster; may be left out if there is one")


def _number(low: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a number >= {low:g}, got {text!r}")
        return value

    return number


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("net.") or "/" in name or ".." in name:
        raise argparse.ArgumentTypeError(f"must be net.NAME=VALUE, got {text!r}")
    return name.replace(".", "/"), value
