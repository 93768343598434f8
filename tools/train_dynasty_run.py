"""One training of train_dynasty.py."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import train_dynasty_models
import train_dynasty_sets
from tasp_coll.files import writing
from train_dynasty_data import DataSet, Examples, spread
from train_dynasty_models import logits
from train_dynasty_options import Options
from train_dynasty_ranks import Exchange, Ranks
from train_dynasty_results import Outcome
from train_dynasty_tasks import Task
from train_dynasty_watch import Diary, Watch, costs, drawn

_QUICK = 1000  # examples of a test on the way
_TEST_BATCH = 250
_RISE = 0.05  # of the steps: up to the highest rate


def run(
    options: Options, task: Task, data: DataSet, ranks: Ranks, told: Callable[[float], None] = lambda loss: None
) -> Outcome:
    """Train and test; the same outcome on all ranks. told: is called with the loss after each step."""
    torch.set_num_threads(options.threads)
    return _Training(options, task, data, ranks).run(told)


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of their own, which begin nothing new once the block is left."""
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=leave_with, initargs=(os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def leave_with(parent: int) -> None:
    """How a worker begins: it ends when the command that started it does, however that came about."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def run_alone(options: Options, task: Task) -> Outcome:
    """The same in a process of its own, which reads the data itself."""
    return run(options, task, load(options), Ranks())


def load(options: Options) -> DataSet:
    """What the options name; train_dynasty_sets.DataError."""
    return train_dynasty_sets.load(options.data_set, options.data, options.seq_len)


def steps_of(options: Options, data: DataSet) -> int:
    """Of a whole training; what does not fill a batch is left out of an epoch."""
    return options.epochs * (len(spread(len(data.train), options.images)) // options.batch)


class _Training:
    def __init__(self, options: Options, task: Task, data: DataSet, ranks: Ranks) -> None:
        import dynasty

        self.options, self.task, self.data, self.ranks = options, task, data, ranks
        self.chosen = spread(len(data.train), options.images)
        self.held_out = spread(len(data.test), options.test_images)
        self.steps = steps_of(options, data)
        self.device = torch.device(options.device)
        torch.manual_seed(task.seed)  # the same weights in all rows
        model = train_dynasty_models.build(options, data).to(self.device)
        block = dynasty.Block(*map(int, options.block.split("x")))
        chosen = {name: getattr(options, name) for name in ("refresh", "warmup", "ramp", "storage")}
        self.model: Any = dynasty.convert(model, task.precision.config(block=block, steps=self.steps, **chosen))
        self.optimizer = _optimizer(options, self.model)
        self.exchange = Exchange(ranks, task.grads, options.mean_bits) if task.grads else None
        self.watch, self.diary = Watch(), Diary(options, task.precision)

    def run(self, told: Callable[[float], None]) -> Outcome:
        begun = time.perf_counter()
        at = {self.steps * number // self.options.evals for number in range(1, self.options.evals)}
        for step in range(1, self.steps + 1):
            loss = self._step(step)
            self.watch.see(step, loss)
            self.diary.see(step, loss, self.model.dynasty)
            told(loss)
            if self.watch.lost:
                break
            if step in at:
                self._test(step, self.held_out[spread(len(self.held_out), _QUICK)])
        accuracy, loss = self._test(step, self.held_out)
        if self.options.checkpoint is not None and self.ranks.rank == 0:
            save(self.options.checkpoint, self.model, self.options, self.task, self.ranks.size)
        return self._outcome(step, accuracy, loss, time.perf_counter() - begun)

    def _step(self, step: int) -> float:
        """One update, the same on all ranks; the mean loss over them."""
        begun = time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * schedule(step, self.steps)
        inputs, targets = self._batch(step)
        loss = nn.functional.cross_entropy(logits(self.model, inputs), targets.flatten())
        mean = self.ranks.sums([loss.item()])[0] / self.ranks.size
        if not math.isfinite(mean):
            return mean
        self.optimizer.zero_grad()
        loss.backward()
        if self.exchange is not None:
            self.exchange([each.grad for each in self.model.parameters() if each.grad is not None])
        self.optimizer.step()
        self.model.dynasty.step(mean, self.ranks.comm)
        if self.exchange is not None:
            self.exchange.step_seconds.append(time.perf_counter() - begun)
        return mean

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's part; the whole depends on seed and step only."""
        seed, batch = self.task.seed, self.options.batch
        epoch, number = divmod(step - 1, self.steps // self.options.epochs)
        order = np.random.default_rng([seed, epoch]).permutation(self.chosen)
        mine = order[number * batch : (number + 1) * batch][self.ranks.mine(batch)]
        return self._fetch(self.data.train, mine, np.random.default_rng([seed, step, self.ranks.rank]))

    def _fetch(self, examples: Examples, indices: Any, rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        inputs, targets = examples.batch(indices, rng)
        return inputs.to(self.device), targets.to(self.device)

    @torch.no_grad()
    def _test(self, step: int, held_out: Any) -> tuple[float, float]:
        """Accuracy and loss over examples of the test half, which ranks share."""
        self.model.eval()
        self.ranks.share_buffers(self.model)
        right, lost, count = 0.0, 0.0, 0.0
        mine = held_out[self.ranks.mine(len(held_out))]
        for start in range(0, len(mine), _TEST_BATCH):
            inputs, targets = self._fetch(self.data.test, mine[start : start + _TEST_BATCH], None)
            scores, wanted = logits(self.model, inputs), targets.flatten()
            right += float((scores.argmax(1) == wanted).sum())
            lost += float(nn.functional.cross_entropy(scores, wanted, reduction="sum"))
            count += len(wanted)
        right, lost, count = self.ranks.sums([right, lost, count])
        accuracy, loss = right / count, lost / count
        finite = loss if math.isfinite(loss) else None
        self.diary.tests.append({"step": step, "accuracy": accuracy, "loss": finite})
        return accuracy, loss

    def _outcome(self, steps: int, accuracy: float, loss: float, seconds: float) -> Outcome:
        quantized, dynamic = (self.task.precision.method in kinds for kinds in (("equal", "dynamic"), ("dynamic",)))
        controller = self.model.dynasty
        return Outcome(
            config=self.task.precision.text,
            grads=self.task.grads,
            seed=self.task.seed,
            accuracy=accuracy,
            loss=loss if math.isfinite(loss) and not self.watch.lost else None,
            diverged=self.watch.diverged,
            steps=steps,
            seconds=seconds,
            bits=self.diary.bits(),
            cost=costs(controller) if quantized else None,
            changed=self.diary.changed(),
            analytics_share=controller.report().analytics_share if dynamic else None,
            exchange=self.exchange.summary() if self.exchange is not None else None,
            tests=tuple(self.diary.tests),
            history=tuple(self.diary.shown()),
            maps=drawn(controller.maps()) if dynamic else None,
        )


def schedule(step: int, steps: int) -> float:
    """Of the highest rate: up in the first steps, then along a cosine down to 0 (Loshchilov and Hutter 2017)."""
    rise = max(1, round(_RISE * steps))
    if step <= rise:
        return step / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


def save(directory: Path, model: nn.Module, options: Options, task: Task, ranks: int) -> None:
    """DIR/NAME.safetensors: all of state_dict(), and what to make a model from that takes it."""
    from safetensors.torch import save_file

    name = "-".join([task.precision.text.replace(":", ""), *([task.grads] if task.grads else []), f"seed{task.seed}"])
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    about = {"setting": json.dumps(options.setting(ranks)), "config": task.precision.text}
    directory.mkdir(exist_ok=True)
    with writing(directory / f"{name}.safetensors") as partial:
        save_file(tensors, partial, metadata=about)


def _optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    if options.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=options.lr, weight_decay=options.weight_decay, momentum=0.9)
