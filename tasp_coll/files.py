"""Files are data: JSON that is read strictly, and writing of which other readers see all or nothing."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST = 1 << 30  # bytes of a file that is read at once


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """All of a regular file; else OSError, or ValueError: a pipe would be waited for, a device has no end."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("must be a regular file, not a directory, a pipe or a device")
        with open(descriptor, "rb", closefd=False) as file:
            held = file.read(LARGEST + 1)
    finally:
        os.close(descriptor)
    if len(held) > LARGEST:
        raise ValueError(f"must have {LARGEST} bytes at most")
    return held


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file (UTF-8) says; OSError or ValueError that tells what is wrong with it.

    Stricter than `json`: no key comes twice in an object, and nesting that is too deep is a ValueError. NaN and
    Infinity are numbers that whoever looks at the entry refuses, by its name.
    """
    text = read_bytes(path).decode("utf-8")
    return parse_json(text)


def parse_json(text: str) -> Any:
    """The same of text; ValueError that tells what is wrong with it."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("JSON must not be nested so deeply") from None


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, beside `path` and with its suffix; on leaving it takes the place of `path`, at once.

    Where the context ends in an exception `path` stays as it was. A link stays a link; what is no regular file, such as
    /dev/stdout or a pipe, is itself the path to write to.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        yield target
        return
    target = Path(os.path.realpath(target))
    partial = target.with_name(f".{target.stem[:64]}.{secrets.token_hex(8)}.partial{target.suffix[:64]}")
    try:
        with open(partial, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield partial
        os.chmod(partial, mode & 0o777)  # of what any file gets here, whoever wrote it
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"keys must come once in an object, got {[key for key, _ in pairs]}")
    return table
