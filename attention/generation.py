"""`model.generate()` with prompt, prefill and key-value cache split over the ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache

import tasp_coll
from attention.agreement import agree
from attention.sequence import sequence_indices
from attention.sharded_cache import ShardedCache, Step
from attention.training import digest

_CACHE_NAMES = ("cache", "past_key_values")  # transformers from 5.24 on, and before


@contextmanager
def sharded_generation(model: Any) -> Iterator[None]:
    """Inside, `model.generate()` works on all ranks of the communicator that the model's attention is registered for.

        with sharded_generation(model):
            tokens = model.generate(prompt, max_new_tokens=50)     # on every rank, with the whole prompt

    Each rank computes its part of the prompt and keeps its part of the cache; new tokens' keys and values go to the
    ranks in turn. Every rank returns the same tokens: logits are those of one rank, and at each prefill the ranks
    take over rank 0's random generator, and keep it, so that sampling agrees too. A prefill gives the logits of the
    last token only. Prompts of a batch have one length; beam search works; assisted decoding, which wants more
    logits, does not. A cache that generate() returned may be passed on to continue; what a longer prompt adds to it is
    computed on every rank alike, and so are all chunks but the first with `prefill_chunk_size`.

    model: a causal language model with `attn_implementation` of `register`. Raises ArgumentError if it has another,
    and from generate(), on every rank, ArgumentError or MismatchError for padding, other caches and prompts that
    differ between ranks.
    """
    comm = _communicator(model)
    taken = inspect.signature(model.forward).parameters
    session = _Session(comm, next((name for name in _CACHE_NAMES if name in taken), _CACHE_NAMES[-1]))
    hooks = [
        model.register_forward_pre_hook(session.before, with_kwargs=True),
        model.register_forward_hook(session.after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _communicator(model: Any) -> tasp_coll.Communicator:
    """The one that the model's attention was registered for."""
    name = model.config._attn_implementation
    function = AttentionInterface().get(name)
    comm = getattr(function, "comm", None)
    if not isinstance(comm, tasp_coll.Communicator):
        raise tasp_coll.ArgumentError(
            "model must have an attention of attention.transformers.register: call register(comm) and "
            f"model.set_attn_implementation('tasp'), got attn_implementation={name!r}"
        )
    if not model._supports_attention_backend:
        raise tasp_coll.ArgumentError(f"{type(model).__name__} does not take its attention from AttentionInterface")
    return comm


@dataclass
class _Session:
    """The hooks of one context; `step` is the forward call under way."""

    comm: tasp_coll.Communicator
    cache_name: str  # the model's argument
    step: Step | None = None

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Cut a forward call's arguments down to this rank's."""
        given = {**kwargs, **({"input_ids": args[0]} if args else {})}
        cache = _cache(given)
        problem = _fault(args, given, self.comm)
        if problem is None and isinstance(cache, ShardedCache) and cache.get_seq_length():
            return (), self._continued(given, cache)
        tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        error = None if problem is None else tasp_coll.ArgumentError(problem)
        agree(self.comm, "generate in sharded_generation", {"prompt": digest(tokens)}, error)
        _share_generator(self.comm, model.device)
        if not isinstance(cache, ShardedCache):
            cache = None if given.get("use_cache") is False else ShardedCache(self.comm)
        return (), self._prefill(given, tokens, cache)

    def after(self, model: Any, args: Any, output: Any) -> Any:
        """One rank's logits for all: in a prefill of the rank that holds the last token, else of rank 0."""
        step, self.step = self.step, None
        assert step is not None
        if step.cache is not None:
            step.cache.step = None
        if isinstance(output, tuple):
            raise tasp_coll.ArgumentError("return_dict must be True in sharded_generation, got False")
        logits, speaks = output.logits, self.comm.rank == 0
        if step.held is not None:
            logits, speaks = logits[:, -1:], bool(len(step.held)) and int(step.held[-1]) == step.stop - 1
        output.logits = self.comm.decomposed_allgatherv((logits if speaks else logits[:0]).contiguous())
        return output

    def _prefill(self, given: Mapping[str, Any], tokens: Tensor, cache: ShardedCache | None) -> dict[str, Any]:
        """This rank's tokens of the prompt, or one whose attention is left out if it holds none."""
        total = tokens.shape[1]
        mine = sequence_indices(total, comm=self.comm)
        index = (mine if len(mine) else torch.zeros(1, dtype=torch.int64)).to(tokens.device)
        places = given.get("position_ids")
        if places is None:
            places = torch.arange(total, device=tokens.device)[None]
        name = "inputs_embeds" if given.get("input_ids") is None else "input_ids"
        part = {name: tokens.index_select(1, index), "position_ids": places.index_select(-1, index.to(places.device))}
        return self._begin(given, part, Step(0, total, mine.numpy(), cache))

    def _continued(self, given: Mapping[str, Any], cache: ShardedCache) -> dict[str, Any]:
        """New tokens, the same on all ranks."""
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        start, count = cache.get_seq_length(), tokens.shape[1]
        places = given.get("position_ids")
        if places is None:
            places = torch.arange(start, start + count, device=tokens.device)[None]
        return self._begin(given, {"position_ids": places}, Step(start, count, None, cache))

    def _begin(self, given: Mapping[str, Any], part: Mapping[str, Any], step: Step) -> dict[str, Any]:
        self.step = step
        if step.cache is not None:
            step.cache.step = step
        rest = {name: value for name, value in given.items() if name not in _CACHE_NAMES}
        return {**rest, **part, "attention_mask": None, self.cache_name: step.cache, "sharded_step": step}


def _cache(given: Mapping[str, Any]) -> Any:
    """The cache that a forward call was given."""
    return next((given[name] for name in _CACHE_NAMES if given.get(name) is not None), None)


def _fault(args: tuple[Any, ...], given: Mapping[str, Any], comm: tasp_coll.Communicator) -> str | None:
    """Why a forward call cannot be split."""
    mask, cache = given.get("attention_mask"), _cache(given)
    if len(args) > 1:
        return "give the model keyword arguments only"
    if "sharded_step" in given:
        return "the model is inside sharded_generation already"
    if mask is not None and (mask.dim() != 2 or not bool((mask != 0).all())):
        return (
            "prompts must not be padded, and attention_mask has zeros (without one, transformers hides tokens equal to "
            "pad_token_id: pass one of ones if they are none): generate each length of prompts in a call of its own"
        )
    if given.get("labels") is not None:
        return "labels are for training, outside sharded_generation, with shard_batch"
    if isinstance(cache, ShardedCache):
        return None if cache.comm is comm else "the cache that was passed belongs to another communicator"
    if not isinstance(given.get("logits_to_keep", 0), int) or given.get("logits_to_keep", 0) > 1:
        return f"logits_to_keep must be 0 or 1 in a prefill (no assisted decoding), got {given['logits_to_keep']}"
    if cache is not None and (type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length()):
        return (
            "cache (past_key_values) must be left out, or be what generate() returned in sharded_generation; leave "
            f"cache_implementation out too, got {type(cache).__name__}"
        )
    return None


def _share_generator(comm: tasp_coll.Communicator, device: torch.device) -> None:
    """Every rank's random generator of the device goes on from rank 0's state."""
    on_host = device.type == "cpu"
    state = torch.get_rng_state() if on_host else getattr(torch, device.type).get_rng_state(device)
    state = comm.decomposed_allgatherv(state if comm.rank == 0 else state[:0])
    if on_host:
        torch.set_rng_state(state)
    else:
        getattr(torch, device.type).set_rng_state(state, device)
