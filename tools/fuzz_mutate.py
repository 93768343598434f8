"""Valid input made wrong: byte by byte, token by token, and in the structure of JSON.

Everything is drawn from a `random.Random`, which hypothesis can be behind (`strategies.randoms`): one grammar for the
tool, which wants speed, and for the tests, which want small counterexamples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

_TOKENS = re.compile(r"\d+|[A-Za-z_]+|\s+|.", re.DOTALL)
_SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 8, 64, 1 << 31, 1 << 63, 1 << 64, 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.5, 1e-9, 1e300, 5e-324, -1e300, "", "0", "s0", "x" * 300, "\ud800", "\x00", "ü", "../../x"),
    *([], {}, [[]], [0], {"a": 1}, [None]),
)
_SPELLED = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "0" * 50, "01", "+1", "'a'", '"\\ud800"', "")
_TEXTS = ("", "0", "-1", "-0", "1e400", "nan", "inf", "-inf", "9" * 20, "9" * 400, "9" * 5000, "1_0", "0x10", "١٢", "½")
_BYTES = (b"", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x00", b"\x1b[2J", b"[" * 3000, b'{"a":' * 2000)


def bytes_of(rng: Random, data: bytes) -> bytes:
    """A few bytes changed, put in, left out, repeated, or the end cut off."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 8, 64)))
        change = rng.randrange(6)
        if change == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[end:]
        elif change == 1:
            data = data[:at] + data[end:]
        elif change == 2:
            data = data[:at] + rng.choice(_BYTES) + data[at:]
        elif change == 3:
            data = data[:end] + data[at:]
        elif change == 4:
            data = data[:at]
        else:
            data = data[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at:end]) + data[end:]
    return data


def text_of(rng: Random, text: str) -> str:
    """Some of its tokens (numbers, words, signs) replaced, left out, repeated or exchanged."""
    tokens = _TOKENS.findall(text) or [""]
    for _ in range(rng.randrange(1, 4)):
        at, other = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        change = rng.randrange(6)
        if change == 0:
            tokens[at] = rng.choice(_TEXTS)
        elif change == 1:
            tokens[at] = ""
        elif change == 2:
            tokens[at] *= rng.choice((2, 2, 3, 40))
        elif change == 3:
            tokens[at], tokens[other] = tokens[other], tokens[at]
        elif change == 4:
            tokens[at] = tokens[at].swapcase() + rng.choice((" ", "\n", "x", ":", ",", "-", "é"))
        else:
            tokens[at] = str(rng.choice((0, 1, 2, 7, 100, 999999, 1000000, 1 << 40)))
    return "".join(tokens)


def json_of(rng: Random, value: Any) -> Any:
    """A few of its values replaced, removed, renamed, repeated or wrapped."""
    for _ in range(rng.randrange(1, 4)):
        value = _changed(rng, value)
    return value


def _changed(rng: Random, value: Any) -> Any:
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        copy: Any = value.copy()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        change = rng.randrange(8)
        if change == 0:
            del copy[key]
        elif change == 1 and isinstance(copy, dict):
            copy[rng.choice(("x", "", str(key).upper(), f"{key} ", "ranks"))] = copy.pop(key)
        elif change == 1:
            copy.insert(key, copy[rng.randrange(len(copy))])
        elif change == 2 and isinstance(copy, list):
            rng.shuffle(copy)
        else:
            copy[key] = _changed(rng, copy[key])
        return copy
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        third = value / 3 if abs(value) < 1e9 else 1e9
        return rng.choice((-value, value + 1, value - 1, value * 1000, third, str(value)[:99], [value]))
    return rng.choice(_SCALARS) if rng.random() < 0.9 else [value]


def spelled(rng: Random, value: Any) -> bytes:
    """As JSON in bytes, now and then with what JSON does not have: NaN, keys twice, another encoding."""
    text = json.dumps(value, indent=rng.choice((None, None, 1)))
    if rng.random() < 0.1 and (numbers := list(re.finditer(r"-?\d+(\.\d+)?", text))):
        found = rng.choice(numbers)
        text = text[: found.start()] + rng.choice(_SPELLED) + text[found.end() :]
    if rng.random() < 0.05 and (pairs := list(re.finditer(r'"\w+": [\w."-]+', text))):
        found = rng.choice(pairs)
        text = text[: found.end()] + ", " + found[0] + text[found.end() :]
    encoding = rng.choice(("utf-8",) * 20 + ("utf-8-sig", "utf-16", "utf-32"))
    return text.encode(encoding)


def file_of(rng: Random, make: Callable[[Random], Any]) -> bytes:
    """A JSON file: what `make` makes, whole or changed on one or more levels."""
    value = make(rng)
    if rng.random() < 0.75:
        value = json_of(rng, value)
    data = spelled(rng, value)
    if rng.random() < 0.1:
        data = text_of(rng, data.decode("utf-8", "replace")).encode("utf-8", "replace")
    return bytes_of(rng, data) if rng.random() < 0.2 else data
