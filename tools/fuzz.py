"""Feed all that reads input with what nobody meant: only documented errors may come of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import fuzz_options
import tasp_coll
from fuzz_options import Options
from tasp_coll.files import writing

TOOL = "fuzz"
SHOWN = 20  # findings that are told in full


class HangError(BaseException):
    """An input took too long. No Exception, so that nobody who is tried takes it for one of his own."""


@dataclass(frozen=True)
class Finding:
    """What went wrong with an input, and how to see it again."""

    parser: str
    number: int
    error: str
    place: str
    input: str
    again: str


@dataclass
class Counts:
    """Of one parser's inputs."""

    inputs: int = 0
    taken: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def record(self, name: str) -> dict[str, Any]:
        """For programs."""
        return {"parser": name, **asdict(self)}


def drawn(name: str, seed: int, number: int) -> Any:
    """Input `number` of a parser: the same for a seed, whatever else is drawn."""
    from fuzz_parsers import PARSERS

    return PARSERS[name].make(Random(f"{seed}/{name}/{number}"))


def tried(name: str, given: Any, folder: Path, limit: float) -> bool | BaseException:
    """Whether the input was taken or refused, or what else came of it."""
    from fuzz_parsers import PARSERS

    try:
        with _alarm(limit):
            return PARSERS[name].attempt(given, folder)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """HangError after so many seconds of computing, or ten times as many of waiting: the machine may be busy."""
    begun, used = time.monotonic(), time.process_time()

    def stop(number: int, frame: FrameType | None) -> None:
        if time.process_time() - used >= 0.9 * seconds or time.monotonic() - begun >= 10 * seconds:
            raise HangError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def numbers(options: Options) -> list[tuple[str, int]]:
    """Which inputs are tried, the parsers in turn, each as often as its share says."""
    whole, count = sum(options.parsers.values()), options.inputs
    each = {name: -(-count * share // whole) for name, share in options.parsers.items()}
    told = [(at / (each[name]), name, options.first + at) for name in each for at in range(each[name])]
    return [(name, number) for _, name, number in sorted(told)[:count]]


def fuzz(options: Options, found: dict[str, Counts]) -> None:
    """Try all inputs; the counts go to their parsers'."""
    begun = time.monotonic()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="tasp-coll-fuzz-", dir=memory) as folder:
        for name, number in _bar(numbers(options)):
            if options.seconds is not None and time.monotonic() - begun > options.seconds:
                break
            given, counts, start = drawn(name, options.seed, number), found[name], time.perf_counter()
            came = tried(name, given, Path(folder), options.limit)
            counts.inputs += 1
            counts.seconds += time.perf_counter() - start
            if isinstance(came, BaseException):
                counts.findings.append(_finding(options, name, number, given, came))
                print(f"{TOOL}.py: {name}: {counts.findings[-1].error[:100]}", file=sys.stderr, flush=True)
            elif came:
                counts.taken += 1
            else:
                counts.refused += 1


def _finding(options: Options, name: str, number: int, given: Any, error: BaseException) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    again = f"python tools/fuzz.py --parser {name} --seed {options.seed} --first {number} --inputs 1"
    told = f"{type(error).__name__}: {str(error)[:300]}"
    return Finding(name, number, told, " < ".join(reversed(places[-5:])), repr(given)[:2000], again)


def _bar(work: list[tuple[str, int]]) -> Iterable[tuple[str, int]]:
    """A progress bar, on a terminal, if tqdm is there."""
    if not sys.stderr.isatty():
        return work
    try:
        from tqdm import tqdm
    except ImportError:
        return work
    return iter(tqdm(work, unit="input", leave=False))


def report(found: dict[str, Counts]) -> None:
    """For people."""
    print(f"# {'parser':12} {'inputs':>9} {'taken':>9} {'refused':>9} {'findings':>9} {'us each':>9}")
    for name, counts in found.items():
        each = 1e6 * counts.seconds / max(counts.inputs, 1)
        row = (counts.inputs, counts.taken, counts.refused, len(counts.findings))
        print(f"  {name:12} {' '.join(f'{figure:>9}' for figure in row)} {each:>9.0f}")
    findings = [finding for counts in found.values() for finding in counts.findings]
    kinds = Counter((finding.parser, finding.error.partition(":")[0], finding.place) for finding in findings)
    for (parser, _, place), count in kinds.most_common():
        first = next(each for each in findings if (each.parser, each.place) == (parser, place))
        print(f"\n{count} x {parser}: {first.error}\n  at {place}\n  input {first.input}\n  again: {first.again}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Wrong usage leaves by SystemExit(2)."""
    options = fuzz_options.parse(argv, __doc__)
    import fuzz_parsers  # noqa: F401  before memory is limited

    _limit_memory(options.room)
    found = {name: Counts() for name in options.parsers}
    with suppress(KeyboardInterrupt):  # tells what was seen
        fuzz(options, found)
    report(found)
    if options.json is not None:
        told = {"tool": TOOL, "version": tasp_coll.__version__, "seed": options.seed}
        with writing(options.json) as partial:
            rows = [counts.record(name) for name, counts in found.items()]
            partial.write_text(json.dumps({**told, "results": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if any(counts.findings for counts in found.values()) else 0


def _limit_memory(gib: float) -> None:
    """So that an input that asks for too much gets a MemoryError, and not the machine's."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    sys.exit(main())
