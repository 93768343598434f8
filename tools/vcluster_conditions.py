"""What is wrong with one direction of a virtual cluster's link, and how it is brought about."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tasp_coll import ArgumentError
from vcluster_room import MissingError, Room, RoomError, python, tool
from vcluster_wiring import BRIDGE_DEVICE, Port, Wiring

MOST_DELAY_MS, MOST_SLOWER = 1e6, 1e9
_LINE = Path(__file__).with_name("vcluster_line.py")
_NO_FILTERS = "filters (CONFIG_NET_CLS_BPF, cls_bpf; CONFIG_NET_SCH_INGRESS, sch_ingress), which lose packets"
_NO_DELAYS = (
    "delays (CONFIG_NET_SCH_NETEM, sch_netem), nor TAP devices (CONFIG_TUN, tun; /dev/net/tun) to make them with; "
    "for a topology's latency_us, --latency-scale 0 does without"
)


@dataclass(frozen=True)
class Condition:
    """What is wrong. slower: factor; lossy: share of packets; delayed_ms: on top, jitter_ms evenly more or less."""

    down: bool = False
    slower: float = 1.0
    lossy: float = 0.0
    delayed_ms: float = 0.0
    jitter_ms: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("slower", 1, MOST_SLOWER),
            ("lossy", 0, 1),
            ("delayed_ms", 0, MOST_DELAY_MS),
            ("jitter_ms", 0, self.delayed_ms),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise ArgumentError(f"{name} must be in {low:g}..{high:g}, got {value!r}")

    def __str__(self) -> str:
        jitter = f" +- {self.jitter_ms:g}" if self.jitter_ms else ""
        told = [
            "down" if self.down else "",
            f"{self.slower:g} times slower" if self.slower != 1 else "",
            f"{100 * self.lossy:g} % lost" if self.lossy else "",
            f"{self.delayed_ms:g}{jitter} ms later" if self.delayed_ms else "",
        ]
        return ", ".join(part for part in told if part) or "as new"

    def after(self, fault: str, amount: float | None, jitter_ms: float = 0.0) -> Condition:
        """The condition with one more fault; "up" clears all. ArgumentError for an amount that makes no sense."""
        if fault == "up":
            return Condition()
        if fault == "down":
            return replace(self, down=True)
        amount = amount or 0.0
        if fault == "slower":
            if not 1 <= amount <= MOST_SLOWER:
                raise ArgumentError(f"slower takes a factor in 1..{MOST_SLOWER:g}, got {amount:g}")
            return replace(self, slower=amount)
        if fault == "lossy":
            if amount > 100:
                raise ArgumentError(f"lossy takes a percentage in 0..100, got {amount:g}")
            return replace(self, lossy=amount / 100)
        if amount > MOST_DELAY_MS:
            raise ArgumentError(f"delayed takes milliseconds in 0..{MOST_DELAY_MS:g}, got {amount:g}")
        if jitter_ms > amount:
            raise ArgumentError(f"jitter must be at most the delay, {amount:g} ms, got {jitter_ms:g}")
        return replace(self, delayed_ms=amount, jitter_ms=jitter_ms)


def impose(room: Room, wiring: Wiring, there: Port, back: Port, condition: Condition) -> None:
    """Bring what leaves at `there` and arrives at `back` into a condition. MissingError, RoomError.

    Rate and netem's delays are the sender's. Loss is the receiver's, and so are delays where there is no netem.
    """
    shaper = wiring.shaper(there, condition.slower, verb="change")
    child = f"qdisc replace dev {there.device} parent 1:1"
    delay = there.latency_us + 1e3 * condition.delayed_ms, 1e3 * condition.jitter_ms  # us: so much, more or less
    by_line = False
    if condition.down:
        room.batch("tc", [shaper, f"{child} handle 30: blackhole"], there.namespace)
    elif not delay[0] or (by_line := not _netem(room, there, [shaper, wiring.delay(there, *delay)])):
        room.batch("tc", [shaper, f"{child} handle 10: bfifo limit {wiring.queue_bytes(there)}"], there.namespace)
    _end_line(room, back)
    if by_line:
        _begin_line(room, wiring, back, delay, condition.lossy)
    _lose(room, back, 1.0 if by_line else condition.lossy)


def _netem(room: Room, port: Port, lines: list[str]) -> bool:
    """Delay by the kernel's own means; False if it has none."""
    try:
        room.batch("tc", lines, port.namespace)
    except RoomError:
        return False
    return True


def _begin_line(room: Room, wiring: Wiring, port: Port, delay: tuple[float, float], lost: float) -> None:
    """Delay what arrives at a port by a process of the room, `vcluster_line`; it also loses what is to be lost."""
    line = _line_device(port)
    asked = {
        "device": port.device,
        "tap": line,
        "delay_s": delay[0] / 1e6,
        "jitter_s": delay[1] / 1e6,
        "lost": lost,
    }
    try:
        room.call([tool("ip"), "netns", "exec", port.namespace, *python(_LINE)], json.dumps(asked))
    except RoomError as error:
        raise MissingError(f"this kernel has no {_NO_DELAYS}: {error}") from error
    lines = [f"link set {line} address {port.mac} mtu {wiring.settings.mtu}"]
    if port.node in wiring.bridges:
        lines += [f"link set {line} master {BRIDGE_DEVICE}"]
        lines += [f"link set {line} type bridge_slave learning off flood off"]
    room.batch("ip", [*lines, f"link set {line} up"], port.namespace)


def _end_line(room: Room, port: Port) -> None:
    with suppress(RoomError):  # there was none
        room.batch("ip", [f"link del {_line_device(port)}"], port.namespace)


def _line_device(port: Port) -> str:
    return f"{port.device}-late"


def _lose(room: Room, port: Port, share: float) -> None:
    """Drop a share of what arrives at a port: there its sender learns of it as of any loss, by no acknowledgement."""
    with suppress(RoomError):  # there was none
        room.batch("tc", [f"qdisc del dev {port.device} clsact"], port.namespace)
    if not share:
        return
    # Classic BPF: load a random number of 32 bits; below the limit return 2 (TC_ACT_SHOT), else -1 (as configured).
    limit = min(round(share * 2**32), 2**32 - 1)
    code = f"4,32 0 0 4294963256,53 0 1 {limit},6 0 0 4294967295,6 0 0 2"
    lines = [
        f"qdisc add dev {port.device} clsact",
        f"filter add dev {port.device} ingress pref 1 handle 1 bpf da bytecode '{code}'",
    ]
    try:
        room.batch("tc", lines, port.namespace)
    except RoomError as error:
        raise MissingError(f"this kernel has no {_NO_FILTERS}: {error}") from error
