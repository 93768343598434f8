"""What doctor.py says: lines for people, the file for programs."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from doctor_links import Connection, Gpu, matrix

Status = Literal["ok", "missing", "broken", "not needed"]
_MARKS: dict[Status, str] = {"ok": "ok", "missing": "MISSING", "broken": "BROKEN", "not needed": "not needed"}


@dataclass(frozen=True)
class Check:
    """One thing, how it is, and what to do if it is not in order."""

    group: str
    name: str
    status: Status
    found: str
    advice: str = ""

    def record(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Whether the bandwidth tests would run on this machine, and how, or why not."""

    ready: bool
    told: str


def text_of(
    checks: Sequence[Check], devices: Sequence[Gpu], links: Sequence[Connection], verdict: Verdict, width: int
) -> str:
    """A line for each check, one below it that says what to do, and whether this machine is ready."""
    lines: list[str] = []
    name_width = max(len(check.name) for check in checks)
    mark_width = max(len(mark) for mark in _MARKS.values())
    for group, members in groupby(checks, key=lambda check: check.group):
        lines += ["", group] if lines else [group]
        for check in members:
            head = f"  {_MARKS[check.status]:{mark_width}}  {check.name:{name_width}}  "
            lines += _folded(head, check.found, width)
            if check.advice:
                lines += _folded(" " * len(head) + "-> ", check.advice, width)
        if group == "links" and (table := matrix(devices, links)):
            lines += ["", *(f"  {line}" for line in table)]
    return "\n".join([*lines, "", f"{'ready' if verdict.ready else 'NOT ready'}: {verdict.told}"])  # to be copied


def write_json(
    path: Path,
    version: str | None,
    checks: Sequence[Check],
    devices: Sequence[Gpu],
    links: Sequence[Connection],
    verdict: Verdict,
) -> None:
    """Write the file that `--help` describes; readers see all of it or nothing."""
    record = {
        "tool": "doctor",
        "version": version,
        "ready": verdict.ready,
        "checks": [check.record() for check in checks],
        "gpus": [device.record() for device in devices],
        "links": [link.record() for link in links],
    }
    told = json.dumps(record, indent=1) + "\n"
    if path.exists() and not path.is_file():  # a pipe, or /dev/stdout, whose place no file may take
        path.write_text(told, encoding="utf-8")
        return
    # As tasp_coll.files has it, which may not be there.
    partial = path.with_name(f".{os.getpid()}.partial")
    try:
        partial.write_text(told, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _folded(head: str, text: str, width: int) -> list[str]:
    """Lines of at most `width` columns where words allow it; the second and later ones under the first's text."""
    folded = textwrap.wrap(
        text,
        max(width, len(head) + 30),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return folded or [head.rstrip()]
