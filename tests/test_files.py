"""Files are data, and written at once: the helpers, and that nobody goes round them."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from launch import REPOSITORY
from tasp_coll.files import read_json, writing

SOURCES = sorted(path for room in ("tasp_coll", "attention", "tools") for path in (REPOSITORY / room).rglob("*.py"))
# What turns a file into code, by the name it is called by.
UNPICKLING = {"load", "loads", "Unpickler", "read_pickle", "save", "dump", "dumps"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize(
    "data, told",
    [
        (b'{"a": 1, "a": 2}', "once"),
        (b"[" * 100_000, "nested|Expecting"),
        (b"\xff", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"", "Expecting"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
    ],
)
def test_strict_json(data: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    if sys.version_info < (3, 10, 7) and data.startswith(b"[9"):
        pytest.skip("integers have no limit of digits there")
    with pytest.raises(ValueError, match=told):
        read_json(path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="regular file"):
            read_json(path)


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    path, link = tmp_path / "out.json", tmp_path / "link.json"
    path.write_text("old")
    link.symlink_to("out.json")

    def fail() -> None:
        with writing(link) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    with writing(link) as partial:
        partial.write_text("new")
    assert (path.read_text(), link.is_symlink(), len(list(tmp_path.iterdir()))) == ("new", True, 2)


def test_modes_are_those_of_the_umask(tmp_path: Path) -> None:
    """Whoever wrote the partial file, and as whatever."""
    before = os.umask(0o027)
    try:
        with writing(tmp_path / "x") as partial:
            partial.unlink()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def write(number: int) -> None:
        with writing(path) as partial:
            partial.write_text(f"{number} " * 5000)
        assert len(set(path.read_text().split())) == 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(100)))
    assert [path] == list(tmp_path.iterdir())


def test_what_is_no_file_is_written_to() -> None:
    """As root a renamed file would take /dev/stdout's place."""
    script = "from tasp_coll.files import writing\nwith writing('/dev/stdout') as out: out.write_text('told')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.stdout, done.returncode) == ("told", 0), done.stderr
    with writing("/dev/null") as out:
        out.write_text("x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


# --- nobody goes round


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All of a module."""
    return tuple(ast.walk(ast.parse(path.read_text())))


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call in a module, and the name that is called, as far as it is one."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_no_pickle_no_shell_and_no_half_written_files() -> None:
    for path in SOURCES:
        check_calls(path)


def check_calls(path: Path) -> None:
    where = path.relative_to(REPOSITORY).as_posix()
    for node in nodes(path):
        names = [each.name for each in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        module = node.module if isinstance(node, ast.ImportFrom) else None
        assert not PICKLES & {name.partition(".")[0] for name in (*names, module or "")}, where
    for call, name in calls(path):
        owner, _, method = name.rpartition(".")
        said = f"{where}:{call.lineno}: {name}"
        assert not (owner in ("torch", "np", "numpy", "cupy", "pickle") and method in UNPICKLING), said
        assert name not in ("os.system", "os.popen", "eval", "exec", "subprocess.getoutput"), said
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("shell", "False") == "False", said
        assert given.get("allow_pickle", "False") == "False", said
        if method in ("write_text", "write_bytes"):
            assert owner in ALONE | WRITTEN.get(where, set()), f"{said}: files are written by tasp_coll.files.writing"
        if name in ("open", "os.fdopen") and len(call.args) > 1 and "w" in ast.unparse(call.args[1]):
            assert where in OPENED, f"{said}: files are written by tasp_coll.files.writing"


ALONE = {"partial"}  # what `writing` gave
WRITTEN = {
    "attention/tracing.py": {"Path(path)"},  # which the caller has from `writing`
    "tools/attention_memory.py": {"_RESET"},  # in /proc
    "tools/doctor_report.py": {"path", "partial"},  # which runs where nothing else does
    # In a folder of their own:
    "tools/break_links_run.py": {"(folder / 'task')"},
    "tools/fuzz_checkpoint.py": {"(place / name)"},
    "tools/fuzz_parsers.py": {"path", "entry"},
}
OPENED = {
    "tasp_coll/files.py",
    "tasp_coll/topology_file.py",  # what `writing` gave
    "tasp_coll/transport/mpi.py",  # /dev/null
    "tools/break_job.py",  # these in temporary directories
    "tools/break_links_run.py",
    "tools/break_peers_job.py",
    "tools/doctor_probes.py",  # its own output
    "tools/doctor_run.py",  # in a temporary directory
}


def test_what_a_shell_is_given_is_fixed() -> None:
    """After "sh", "-c" comes a constant, or a name that is one, or a number alone: never what somebody typed."""
    lists = [(path, node) for path in SOURCES for node in nodes(path) if isinstance(node, (ast.List, ast.Tuple))]
    for source, listed in lists:
        items = [ast.unparse(item) for item in listed.elts]
        for shell, flag, script in zip(items, items[1:], items[2:], strict=False):
            if shell.strip("'").rpartition("/")[2] in ("sh", "bash") and flag == "'-c'":
                fixed = script.startswith(("'", '"')) or script.isupper() or script == "f'kill -{int(number)} -1'"
                assert fixed, f"{source.name}: {script}"
