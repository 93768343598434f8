"""From a program to launches: what a stream is given, in order, while no host waits.

In host memory a message starts when what it needs has happened (`executor.Flow`). A stream has one order only, so all
messages of a step form one group, which starts when everything given to the stream before it is complete, and which
is complete when all its messages are. Both ends of a message are in the groups of the same step, and groups come in
the order of steps on every rank: nothing can wait in a circle. Within a group, messages between two ranks match in
the order in which they were given, as NCCL's do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasp_coll.errors import ScheduleError
from tasp_coll.executor import Action, Node, Place, Program


@dataclass(frozen=True)
class Launch:
    """Actions one after another, then a group of messages."""

    step: int
    actions: tuple[Action, ...]
    messages: tuple[Node, ...]


class Links(Protocol):
    """What carries launches between the GPUs of all ranks.

    Ranks give it the same launches in the same order. Where they go to several streams, each must come after the
    earlier ones by the streams' own order or by events.
    """

    name: str
    rank: int
    size: int
    broken: str | None  # why it cannot be used any more
    has_allgather: bool  # a library's own, as `NcclLinks.allgather`

    def prepare(self, launches: Sequence[Launch]) -> tuple[Launch, ...]:
        """The launches as `launch` takes them, all or some. Collective; may block, and raises within the timeout."""

    def launch(
        self,
        launches: Sequence[Launch],
        address: Callable[[Place], int],
        act: Callable[[Action], None],
        stream: int,
    ) -> None:
        """Give launches to a stream, and wait for none of them.

        address: where a place is on the device. act: gives an action to the same stream. stream: its handle.
        """

    def group(self, messages: Sequence[tuple[bool, int, int, int]], stream: int) -> None:
        """A first message over every edge, on all ranks: (is it a send, peer, address, bytes) each."""

    def check(self) -> None:
        """Raise CollectiveError for what has gone wrong since."""

    def abort(self, why: str) -> None:
        """End everything under way on the device, so that nothing waits for peers that are gone."""

    def close(self) -> None:
        """Give everything back, when the device has finished with it. After `abort`: does not wait."""


def launches(program: Program) -> tuple[Launch, ...]:
    """The program as a stream runs it.

    ScheduleError: a message needs what its own step or a later one brings, or the program waits for the caller
    (step-wise programs do).
    """
    if program.gates:
        raise ScheduleError("a program that waits for its caller step by step is no sequence of launches")
    order = _ordered(program)
    levels = _levels(program, order)
    actions: dict[int, list[Action]] = defaultdict(list)
    messages: dict[int, list[tuple[int, int, int, Node]]] = defaultdict(list)
    for index in order:
        node = program.nodes[index]
        if node.place is not None:
            messages[node.step].append((node.peer, node.lane, index, node))
        elif node.action is not None:
            actions[levels[index]].append(node.action)
    steps = sorted({*actions, *messages})
    # Lanes keep their order on both ends, and so does this.
    return tuple(
        Launch(step, tuple(actions[step]), tuple(node for *_, node in sorted(messages[step], key=lambda m: m[:3])))
        for step in steps
    )


def _ordered(program: Program) -> list[int]:
    """The nodes, each after those that it waits for."""
    waits = list(program.waits)
    ready = [index for index, count in enumerate(waits) if not count]
    found = []
    while ready:
        found.append(index := ready.pop())
        for follower in program.feeds[index]:
            waits[follower] -= 1
            if not waits[follower]:
                ready.append(follower)
    if len(found) < len(program.nodes):
        raise ScheduleError("operations of a program wait for each other in a circle")
    return found


def _levels(program: Program, order: Sequence[int]) -> list[int]:
    """The launch of each node: of messages their step, of actions the first one before which all they need is there."""
    levels = [node.step if node.place is not None else 0 for node in program.nodes]
    for index in order:
        source = program.nodes[index]
        after = levels[index] + (source.place is not None)
        for follower in program.feeds[index]:
            node = program.nodes[follower]
            if node.place is None:
                levels[follower] = max(levels[follower], after)
            elif after > node.step:
                kind = "sends" if node.send else "receives"
                raise ScheduleError(
                    f"a rank {kind} at this step what another operation of step {source.step} has not finished with",
                    step=node.step,
                    ring=node.lane,
                )
    return levels
