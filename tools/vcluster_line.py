"""Runs inside a virtual cluster's room: a delay line for what arrives at a port, where the kernel has no netem.

It reads all frames that arrive, before the filter that drops them there (`vcluster_conditions`), and writes each, when
it is due, to a TAP device of the same network namespace, whose stack or bridge takes it from there: the rest of the
way is as if the port had received it later. What the kernel knows of a frame (checksums left to hardware, segments
still in one piece) goes with it. Frames never overtake each other.

It takes one request from its input, JSON:

    {"device": the port, "tap": name of the TAP device to make,
     "delay_s": seconds, "jitter_s": evenly, at most so much more or less, "lost": share that is dropped instead}

and goes on in the background, for as long as the TAP device is there; the device goes when the process ends. It needs
nothing but the standard library.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from contextlib import suppress

_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_SO_RCVBUFFORCE = 33
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000
_RECEIVE_BUFFER = 16 << 20  # what may arrive while this process waits for a core
_LARGEST_FRAME = 1 << 17
_AT_ONCE = 64  # frames read before those that are due are written


def arrivals(device: str) -> socket.socket:
    """A socket that reads every frame that arrives at a device, behind the ten bytes that describe it."""
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    found.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    found.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)  # as much as users may
    with suppress(PermissionError):
        found.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    found.bind((device, _ETH_P_ALL))
    return found


def tap_device(name: str) -> int:
    """Make a TAP device, which lives as long as this descriptor; frames are written behind the same ten bytes."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    return tap


def carry(source: socket.socket, tap: int, delay_s: float, jitter_s: float, lost: float) -> None:
    """Let frames wait. Ends with OSError when the TAP device is gone."""
    memory = memoryview(bytearray(_LARGEST_FRAME))
    held: deque[tuple[float, bytes]] = deque()
    arriving, due = source.fileno(), 0.0
    while True:
        while held and held[0][0] <= time.monotonic():
            _write(tap, held.popleft()[1])
        wait = max(held[0][0] - time.monotonic(), 0.0) if held else None
        ready, _, _ = select.select([arriving, tap], [], [], wait)
        if tap in ready:
            os.read(tap, _LARGEST_FRAME)  # nothing is sent this way but, now and then, to everybody
        for _ in range(_AT_ONCE if arriving in ready else 0):
            try:
                size = source.recv_into(memory)
            except BlockingIOError:
                break
            except OSError:  # the port went down for a while
                continue
            if random.random() >= lost:
                due = max(due, time.monotonic() + delay_s + random.uniform(-jitter_s, jitter_s))
                held.append((due, bytes(memory[:size])))


def _write(tap: int, frame: bytes) -> None:
    try:
        os.write(tap, frame)
    except OSError as error:
        if error.errno == errno.EBADFD:  # the device is gone; else it is not up yet
            raise


def main() -> None:
    """Make both ends, say so by ending well, and go on in the background."""
    asked = json.load(sys.stdin)
    try:
        source, tap = arrivals(asked["device"]), tap_device(asked["tap"])
    except OSError as error:
        sys.exit(str(error))
    if os.fork():
        os._exit(0)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    with suppress(OSError):
        carry(source, tap, asked["delay_s"], asked["jitter_s"], asked["lost"])


if __name__ == "__main__":
    main()
