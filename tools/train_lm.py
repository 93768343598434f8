"""Train a small language model on the bytes of a text, with one long context split over the ranks."""

from __future__ import annotations

import os
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import perf_plot
import tasp_coll
import train_lm_checkpoint
from perf_collective import Unsupported
from perf_launch import agree, can_write, communicator, launch
from tasp_coll.bootstrap import launched_ranks
from train_lm_options import Options, parse
from train_lm_report import TOOL, Report, Step

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor

_PACKAGES = "pip install 'tasp-coll[transformers,mpich]'"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Train, and leave with an exit status, the same on all ranks. argv: None for the process's own."""
    launch(TOOL, lambda quiet: parse(__doc__, argv, quiet=quiet), _train, _PACKAGES)


def _train(world: MPI.Intracomm, options: Options) -> int:
    _check(world, options)
    held = _text(world, options)
    _imports(world)
    import torch

    from attention.transformers import register

    torch.manual_seed(options.seed)  # the same weights on all ranks
    with communicator(options.topology, options.timeout) as comm:
        register(comm, method=options.method)
        model, optimizer, done = _begin(world, options)
        text = torch.frombuffer(bytearray(held), dtype=torch.uint8)
        report = Report(comm, options, model)
        results = []
        for step in range(done + 1, done + options.steps + 1):
            results.append(_step(step, model, optimizer, text, options, comm))
            report.row(results[-1])
            if options.save_every and step % options.save_every == 0:
                _save(world, options, model, optimizer, step)
        report.end(results)
        if options.save is not None:
            _save(world, options, model, optimizer, done + options.steps)
    return 0


def _step(step: int, model: Any, optimizer: Any, text: Tensor, options: Options, comm: tasp_coll.Communicator) -> Step:
    """One update of the weights, the same on all ranks."""
    import torch

    from attention.transformers import global_loss, shard_batch, sync_gradients

    begun = time.perf_counter()
    ids = contexts(text, options, step)
    low = torch.autocast(ids.device.type, torch.bfloat16) if options.dtype == "bfloat16" else nullcontext()
    with low:
        share = model(**shard_batch(ids, ids, comm=comm)).loss
    loss = global_loss(share, comm=comm)
    loss.backward()
    sync_gradients(model, comm=comm)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = options.lr * min(1.0, step / max(1, options.warmup))
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - begun
    return Step(step, loss.item(), float(norm), seconds, ids.numel() / seconds)


def contexts(text: Tensor, options: Options, step: int) -> Tensor:
    """(batch, seq_len): places in the text that depend on seed and step only, so that a resumed run goes on as one."""
    import numpy as np
    import torch

    highest = len(text) - options.seq_len
    starts = np.random.default_rng([options.seed, step]).integers(0, highest, options.batch, endpoint=True)
    return torch.stack([text[start : start + options.seq_len] for start in starts.tolist()]).long()


def _begin(world: MPI.Intracomm, options: Options) -> tuple[Any, Any, int]:
    """Model, optimizer and the steps that they have behind them."""
    import torch

    held, error = None, ""
    try:
        held = None if options.resume is None else train_lm_checkpoint.load(options.resume)
    except train_lm_checkpoint.CheckpointError as caught:
        error = f"--resume must be a checkpoint of --save, got {str(options.resume)!r}: {caught}"
    agree(world, error)
    model = _new_model(options) if held is None else held.model
    model.to(torch.float64 if options.dtype == "float64" else torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    if held is None:
        return model, optimizer, 0
    held.restore(optimizer)
    return model, optimizer, held.step


def _new_model(options: Options) -> Any:
    sizes = {
        "hidden_size": options.width,
        "intermediate_size": -(-options.width * 8 // 24) * 8,
        "num_hidden_layers": options.depth,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads or options.heads,
        "max_position_embeddings": options.seq_len,
    }
    return train_lm_checkpoint.new_model(sizes, options.window)


def _save(world: MPI.Intracomm, options: Options, model: Any, optimizer: Any, step: int) -> None:
    """Rank 0 writes the checkpoint; the others wait for it."""
    if world.rank == 0 and options.save is not None:
        train_lm_checkpoint.save(options.save, model, optimizer, step)
    world.barrier()


def _text(world: MPI.Intracomm, options: Options) -> bytes:
    """All bytes of the text."""
    held, error = b"", ""
    try:
        held = options.text.read_bytes() if options.text else b"".join(sources())
    except OSError as caught:
        error = f"--text cannot be read: {caught}"
    if not error and len(held) < options.seq_len:
        error = f"--text must have --seq-len {options.seq_len} bytes at least, got {len(held)}"
    agree(world, error)
    return held


def sources() -> Iterator[bytes]:
    """The standard library's modules, in the order of their names."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_bytes()


def _check(world: MPI.Intracomm, options: Options) -> None:
    """Before the time is spent: whether this can run, and its files be written."""
    launched = launched_ranks()
    if world.size == 1 and launched is not None and launched > 1:
        raise Unsupported(f"{launched} ranks were started by an mpiexec of another MPI than mpi4py's: {_PACKAGES}")
    error = ""
    if options.resume is not None and not os.path.isfile(options.resume / train_lm_checkpoint.TRAINING):
        name = train_lm_checkpoint.TRAINING
        error = f"--resume must be a checkpoint of --save, with {name}, got {str(options.resume)!r}"
    for flag, path in (("--json", options.json), ("--plot", options.plot), ("--save", options.save)):
        if world.rank == 0 and path is not None and not _writable(path, is_file=flag != "--save"):
            kind = "directory" if flag == "--save" else "file"
            error = error or f"{flag} must be a {kind} in a directory that can be written to, got {str(path)!r}"
    if options.plot is not None and world.rank == 0:
        error = error or perf_plot.fault(options.plot)
    agree(world, error)


def _imports(world: MPI.Intracomm) -> None:
    """What takes seconds, and what may be missing."""
    error = ""
    try:
        import torch  # noqa: F401
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    except ImportError as missing:
        error = f"{missing}: {_PACKAGES}"
    agree(world, error)


def _writable(path: Path, is_file: bool) -> bool:
    return can_write(path) if is_file else os.access(path.absolute().parent, os.W_OK) and not os.path.isfile(path)


if __name__ == "__main__":
    main()
