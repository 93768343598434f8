"""Processes forked from a rank: the connections are the parent's, and the library's threads are not there."""

from __future__ import annotations

import os
import sys

from tasp_coll.errors import CollectiveError


class Origin:
    """The process in which a library began to run."""

    def __init__(self, library: str) -> None:
        self._library, self._process = library, os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this is another process, forked from that one."""
        return os.getpid() != self._process

    def check(self) -> None:
        """CollectiveError in a forked process."""
        if self.forked:
            raise CollectiveError(
                f"this process was forked from a rank that had begun to use {self._library}, which cannot be shared: "
                "start processes that communicate by multiprocessing's 'spawn'"
            )

    def leave(self) -> None:
        """At the interpreter's exit: a forked process ends here, before the library hangs or takes the parent along.

        Not after os._exit, by which multiprocessing's children leave.
        """
        if not self.forked:
            return
        sys.stdout.flush()
        told = f"tasp_coll: process {os.getpid()} was forked from a rank of {self._library}: end it with os._exit"
        print(told, file=sys.stderr, flush=True)
        os._exit(1)
