"""From a program to launches: what a stream is given, in order, while no host waits.

In host memory a message starts when what it needs has happened (`executor.Flow`). A stream has one order only, so all
messages of a step form one group, which starts when everything given to the stream before it is complete, and which
is complete when all its messages are. Both ends of a message are in the groups of the same step, and groups come in
the order of steps on every rank: nothing can wait in a circle. Within a group, messages between two ranks match in
the order in which they were given, as NCCL's do.

Where a program waits for its caller, step by step, a launch names the gates that must be open before it, and the marks
that are reached with it: on a GPU both are events.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasp_coll.errors import ScheduleError
from tasp_coll.executor import Action, Node, Place, Program

FIRST = -1  # the step of what waits for nothing


@dataclass(frozen=True)
class Launch:
    """Actions one after another, then a group of messages.

    gates: of the program, those that actions and messages wait for. marks: all nodes of these are complete with this
    launch. together: something here needs more than earlier messages of its own lane, so that lanes that are given to
    streams of their own must meet first.
    """

    step: int
    actions: tuple[Action, ...] = ()
    messages: tuple[Node, ...] = ()
    gates: tuple[object, ...] = ()
    marks: tuple[object, ...] = ()
    together: bool = False


class Strands(Protocol):
    """Streams that launches are given to, one for each communicator; the first is the one that all is ordered on."""

    @property
    def handles(self) -> Sequence[int]:
        """Of CUDA."""

    def meet(self) -> None:
        """What any of them is given from now on comes after all that any was given until now."""


class Links(Protocol):
    """What carries launches between the GPUs of all ranks.

    Ranks give it the same launches in the same order. Unless it `orders_streams` itself, launches that go to several
    streams must come one after another by events.
    """

    name: str
    rank: int
    size: int
    broken: str | None  # why it cannot be used any more
    has_allgather: bool  # a library's own, as `NcclLinks.allgather`
    orders_streams: bool

    @property
    def communicators(self) -> int:
        """How many streams a launch is given to."""

    def prepare(self, launches: Sequence[Launch]) -> tuple[Launch, ...]:
        """The launches as `launch` takes them, all or some. Collective; may block, and raises within the timeout."""

    def launch(
        self,
        launches: Sequence[Launch],
        address: Callable[[Place], int],
        act: Callable[[Action], None],
        strands: Strands,
    ) -> None:
        """Give launches to streams, and wait for none of them.

        address: where a place is on the device. act: gives an action to the first stream.
        """

    def greet(self, messages: Sequence[tuple[bool, int, int, int]], stream: int) -> None:
        """First messages over every edge, on all ranks: (is it a send, peer, address, bytes) each."""

    def check(self) -> None:
        """Raise CollectiveError for what has gone wrong since."""

    def abort(self, why: str) -> None:
        """End everything under way on the device, so that nothing waits for peers that are gone."""

    def close(self) -> None:
        """Give everything back, when the device has finished with it. After `abort`: does not wait."""


def launches(program: Program) -> tuple[Launch, ...]:
    """The program as a stream runs it. ScheduleError: a message needs what its own step or a later one brings."""
    order = _ordered(program)
    levels = _levels(program, order)
    members: dict[int, list[int]] = defaultdict(list)
    for index in order:
        node = program.nodes[index]
        if node.place is not None or node.action is not None:
            members[levels[index]].append(index)
    sources: dict[int, list[int]] = defaultdict(list)
    for source, followers in enumerate(program.feeds):
        for follower in followers:
            sources[follower].append(source)
    marks: dict[int, list[object]] = defaultdict(list)
    for name, group in program.marks.items():
        marks[max(levels[index] for index in group)].append(name)
    return tuple(_launch(program, step, members[step], sources, tuple(marks[step])) for step in sorted(members))


def _launch(
    program: Program, step: int, members: Sequence[int], sources: dict[int, list[int]], marks: tuple[object, ...]
) -> Launch:
    nodes, names = program.nodes, {index: name for name, index in program.gates.items()}
    actions = tuple(node.action for node in (nodes[index] for index in members) if node.action is not None)
    messages = [index for index in members if nodes[index].place is not None]
    # Lanes keep their order on both ends, and so does this.
    messages.sort(key=lambda index: (nodes[index].peer, nodes[index].lane, index))
    gates = tuple({names[source]: None for index in members for source in sources[index] if source in names})
    crossing = any(nodes[source].lane != nodes[index].lane for index in messages for source in sources[index])
    together = bool(actions or gates or crossing)
    return Launch(step, actions, tuple(nodes[index] for index in messages), gates, marks, together)


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
    """The launch of each node: of messages and gates their step, of actions the first before which all they need is
    there."""
    gates = set(program.gates.values())
    levels = [
        node.step if node.place is not None or index in gates else FIRST for index, node in enumerate(program.nodes)
    ]
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
