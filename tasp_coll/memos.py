"""Calls made before with the same arrays, ready to run again.

Looking at arrays and options, and checking them against each other, costs more than a small message. A memo is valid
while the arrays are the very same objects with unchanged memory, shape, strides and type; it keeps neither alive.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

import numpy as np

_LIMIT = 64


class Repeatable(Protocol):
    """An operation that can run again."""

    repeatable: bool

    def again(self, send: Any, recv: Any) -> None:
        """Get ready for another run with the same arrays."""

    def forget(self) -> None:
        """Let go of the arrays."""


class Memo(NamedTuple):
    """An operation with what it was made for."""

    key: tuple[Any, ...]
    operation: Any
    send: Any  # weakref.ref
    recv: Any  # weakref.ref, or None
    send_interface: dict[str, Any]
    recv_interface: Any  # dict, or None


class Memos:
    """The memos used last. One that is taken is out until it is put back, so that no two threads share it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], Memo] = OrderedDict()

    def take(self, kind: type, send: Any, recv: Any, options: Any) -> Memo | None:
        """The memo for this call, if there is a valid one."""
        try:
            memo = self._kept.pop((kind, id(send), id(recv), options), None)
        except TypeError:  # options that cannot be hashed are bad ones, which the operation will say
            return None
        if memo is None or memo.send() is not send or send.__array_interface__ != memo.send_interface:
            return None
        if memo.recv is not None and (memo.recv() is not recv or recv.__array_interface__ != memo.recv_interface):
            return None
        return memo

    def put_back(self, memo: Memo) -> None:
        """After a run."""
        if memo.recv is None:
            memo.operation.forget()
        else:
            memo.operation.given = None
        self._kept[memo.key] = memo

    def keep(self, operation: Repeatable, send: Any, recv: Any, options: Any) -> None:
        """Make a memo of a call that went well, where its arrays are plain NumPy."""
        plain = type(send) is np.ndarray and send.flags.c_contiguous and (recv is None or type(recv) is np.ndarray)
        if not (plain and operation.repeatable):
            return
        key = (type(operation), id(send), id(recv), options)
        operation.forget()
        self._kept[key] = Memo(
            key,
            operation,
            weakref.ref(send),
            None if recv is None else weakref.ref(recv),
            send.__array_interface__,
            None if recv is None else recv.__array_interface__,
        )
        if len(self._kept) > _LIMIT:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
