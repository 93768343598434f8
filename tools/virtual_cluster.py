"""Builds a cluster of network namespaces on this machine, and runs MPI ranks on it. See --help."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import vcluster_build
import vcluster_faults
import vcluster_job
import vcluster_registry
import vcluster_room
from tasp_coll import ArgumentError, TopologyError
from tasp_coll.topology import read_named
from vcluster_job import Stopped
from vcluster_options import FAILED, parse
from vcluster_registry import Cluster
from vcluster_room import MissingError, Room, RoomError
from vcluster_wiring import Settings, Wiring, checked


@contextmanager
def built(asked: argparse.Namespace, *, stays: bool) -> Iterator[tuple[Cluster, Room]]:
    """The cluster that is asked for; it ends with this context unless it stays and all went well."""
    began = time.monotonic()
    topology = checked(read_named(asked.topology))
    mtu = Settings.suited_mtu(topology, asked.link_mbit) if asked.mtu is None else asked.mtu
    settings = Settings(asked.link_mbit, mtu, asked.burst_ms, asked.queue_ms, asked.latency_scale)
    wiring = Wiring(topology, settings)
    kept = False
    with vcluster_job.signals_stop():
        cluster = vcluster_registry.claim(asked.name, topology, settings)
        try:
            with vcluster_room.opened() as (room, holder):
                cluster = cluster.moved_in(room, stays=False)
                vcluster_build.build(room, wiring, dict(asked.kernel))
                ready = time.monotonic()
                goodput = (
                    vcluster_build.measure(room, wiring)
                    if asked.goodput is None
                    else vcluster_build.stated(wiring, asked.goodput)
                )
                wiring.delivered(goodput).save(cluster.topology_file)
                if not asked.quiet:
                    tell(_summary(cluster, wiring, goodput, ready - began))
                yield cluster, room
                if stays:
                    vcluster_room.keep(holder)
                    cluster.moved_in(room, stays=True)
                    kept = True
        finally:
            if not kept:
                cluster.remove()


def tell(message: str) -> None:
    """Say something that is not the command's output."""
    print(f"virtual_cluster: {message}", file=sys.stderr, flush=True)


def run(asked: argparse.Namespace, command: list[str]) -> int:
    """Run a command on every host, of a new cluster or of one that is up."""
    launcher = vcluster_job.mpiexec()
    if asked.on is not None:
        cluster = vcluster_registry.find(asked.on)
        with vcluster_job.signals_stop():
            return _job(launcher, cluster, cluster.enter(), command)
    with built(asked, stays=False) as (cluster, room):
        return _job(launcher, cluster, room, command)


def up(asked: argparse.Namespace, command: list[str]) -> int:
    """Build a cluster that stays."""
    with built(asked, stays=True) as (cluster, _):
        print(cluster.name, flush=True)
    return 0


def down(asked: argparse.Namespace, command: list[str]) -> int:
    """End clusters."""
    there = vcluster_registry.clusters()
    chosen = there if asked.all else [vcluster_registry.find(name) for name in asked.names]
    for cluster in chosen:
        cluster.remove()
    return 0


def show(asked: argparse.Namespace, command: list[str]) -> int:
    """List clusters."""
    for cluster in vcluster_registry.clusters():
        who = "up" if cluster.owner is None else f"run by {cluster.owner.pid}"
        print(f"{cluster.name:10} {cluster.spec}, links up to {cluster.settings.link_mbit:g} Mbit/s, {who}")
        for (u, v), condition in vcluster_faults.conditions(cluster).items():
            print(f"{'':10} {u} -> {v}: {condition}")
    return 0


def execute(asked: argparse.Namespace, command: list[str]) -> int:
    """Become a command on one host."""
    cluster = vcluster_registry.find(asked.on)
    wiring, room = cluster.wiring(), cluster.enter()
    if not 0 <= asked.rank < wiring.topology.ranks:
        raise ArgumentError(f"RANK must be in 0..{wiring.topology.ranks - 1}, got {asked.rank}")
    on_host = vcluster_job.on_host(wiring, asked.rank, command)
    arguments = room.entering_here(on_host)
    os.execvpe(arguments[0], arguments, vcluster_job.environment(wiring, cluster.topology_file))


def fault(asked: argparse.Namespace, command: list[str]) -> int:
    """Change a live link."""
    cluster = vcluster_registry.find(asked.on)
    what = asked.a, asked.b, asked.fault, asked.amount, asked.jitter
    condition = vcluster_faults.inflict(cluster, *what, one_way=asked.one_way)
    tell(f"{cluster.name}: {asked.a} {'->' if asked.one_way else '<->'} {asked.b}: {condition}")
    return 0


ACTIONS: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
    "run": run,
    "up": up,
    "down": down,
    "list": show,
    "exec": execute,
    "fault": fault,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status. Wrong usage leaves by SystemExit(2)."""
    asked, command = parse(sys.argv[1:] if argv is None else argv)
    try:
        return ACTIONS[asked.action](asked, command)
    except Stopped as stopped:
        return stopped.status
    except (ArgumentError, TopologyError, MissingError, RoomError, OSError) as error:
        if ended := vcluster_job.stopped_by(error):  # what went wrong while a signal ended it
            return ended.status
        tell(f"error: {error}")
        return FAILED


def _job(launcher: str, cluster: Cluster, room: Room, command: list[str]) -> int:
    wiring = cluster.wiring()
    variables = vcluster_job.environment(wiring, cluster.topology_file)
    return vcluster_job.run(room, vcluster_job.command_of(launcher, wiring, command), variables)


def _summary(cluster: Cluster, wiring: Wiring, goodput: dict[float, float], seconds: float) -> str:
    topology, settings = wiring.topology, wiring.settings
    rates = ", ".join(f"{8e3 * goodput[GBps]:.4g}" for GBps in sorted(goodput, reverse=True))
    share = median(8e9 * rate / wiring.rate_bit(GBps) for GBps, rate in goodput.items()) if goodput else 1.0
    return (
        f"{cluster.name} is {topology.name}: {topology.ranks} hosts, {len(wiring.cables)} cables, links up to "
        f"{settings.link_mbit:g} Mbit/s, MTU {settings.mtu}, built in {seconds:.2g} s; they deliver {rates} Mbit/s "
        f"({share:.3f} of nominal)"
    )


if __name__ == "__main__":
    sys.exit(main())
