"""Runs inside a virtual cluster's room: kernel settings of its namespaces, and streams that measure its links.

It reads a request from its input and prints a reply, both JSON, and needs nothing but the standard library: a single
process, which steps from one network namespace into another.

    {"settings": [[namespace, path below /proc/sys, value], ...],
     "streams": [[[from namespace, to namespace, address of to, settle seconds, seconds], ...], ...]}

Settings that this kernel does not have are passed over. The streams of one inner list run at the same time. The reply
is a list of lists alike: payload bytes per second.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_CLONE_NEWNET = 0x40000000
_PIECE = bytes(1 << 18)
_CONNECT_S = 10.0


def enter(fd: int) -> None:
    """Step into the network namespace that is open as `fd`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


@contextmanager
def namespace(name: str) -> Iterator[None]:
    """Be in a network namespace; sockets made there stay there."""
    with open("/proc/self/ns/net") as home, open(f"/run/netns/{name}") as there:
        enter(there.fileno())
        try:
            yield
        finally:
            enter(home.fileno())


def write(settings: list[tuple[str, str, str]]) -> None:
    """Write kernel settings, each in its namespace."""
    for name, path, value in settings:
        with namespace(name), suppress(FileNotFoundError):
            fd = os.open(f"/proc/sys/{path}", os.O_WRONLY)
            try:
                os.write(fd, value.encode())
            except OSError as error:
                sys.exit(f"/proc/sys/{path} does not take {value!r}: {error.strerror}")
            finally:
                os.close(fd)


class Stream:
    """A TCP stream from one namespace to another, measured where it arrives."""

    def __init__(self, source: str, target: str, address: str, settle_s: float, seconds: float) -> None:
        self._settle_s, self._seconds = settle_s, seconds
        self.rate = 0.0
        with namespace(target), socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            with namespace(source):
                self._out = socket.create_connection((address, port), _CONNECT_S)
            self._in, _ = server.accept()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]

    def start(self) -> None:
        """Begin to send and to measure."""
        for thread in self._threads:
            thread.start()

    def end(self) -> float:
        """Wait for the measurement; payload bytes per second."""
        self._threads[1].join()
        for end in (self._in, self._out):  # at once, with whatever is still under way
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._threads[0].join()
        return self.rate

    def _send(self) -> None:
        with suppress(OSError):
            while True:
                self._out.sendall(_PIECE)

    def _receive(self) -> None:
        memory = memoryview(bytearray(1 << 18))
        self._in.settimeout(2 * (self._settle_s + self._seconds) + _CONNECT_S)
        begin = time.monotonic() + self._settle_s
        first = last = 0.0
        total = 0
        with suppress(OSError):
            while last < begin + self._seconds:
                count = self._in.recv_into(memory)
                last = time.monotonic()
                if not count:
                    return
                if first:
                    total += count
                elif last >= begin:
                    first = last
            self.rate = total / (last - first)


def main() -> None:
    """Read the request, do it, print the reply."""
    request = json.load(sys.stdin)
    write(request["settings"])
    rates = []
    for group in request["streams"]:
        streams = [Stream(*stream) for stream in group]
        for stream in streams:
            stream.start()
        rates.append([stream.end() for stream in streams])
    json.dump(rates, sys.stdout)


if __name__ == "__main__":
    main()
