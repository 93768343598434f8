"""Hugging Face transformers on tasp-coll: unchanged causal language models with one context split over the ranks.

    import attention.transformers
    attention.transformers.register(comm)                             # once; binds the name "tasp" to comm
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="tasp")

    batch = attention.transformers.shard_batch(input_ids, input_ids, comm=comm)      # training
    loss = attention.transformers.global_loss(model(**batch).loss, comm=comm)
    loss.backward()
    attention.transformers.sync_gradients(model, comm=comm)

    with attention.transformers.sharded_generation(model):                           # inference
        tokens = model.generate(prompt, max_new_tokens=50)

All ranks make the same calls with the same arguments. Models need RoPE or other positions that come from
`position_ids`, and attention through `transformers.AttentionInterface`: Llama, Qwen2, Qwen3, Mistral (with its
sliding window) and most others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

import tasp_coll
from attention.agreement import agree, refuse
from attention.function import METHODS, context_parallel_attention
from attention.generation import sharded_generation
from attention.kv_bits import Bits
from attention.sharded_cache import ShardedCache, Step, decode
from attention.training import global_loss, shard_batch, sync_gradients

__all__ = ["ShardedCache", "global_loss", "register", "shard_batch", "sharded_generation", "sync_gradients"]

# Keyword arguments by which models ask for another attention than softmax(q k^T * scale) v.
_OTHER_ATTENTION = ("softcap", "s_aux", "position_bias", "head_mask", "cache")
_ATTENTION = ("full_attention", "sliding_attention")
_TOKEN_BY_TOKEN = ("moe", "mlp")  # layers that need no other tokens
# Their frequencies depend on the longest position of a call, of which a rank sees only its own part.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_WHOLE = (
    "this call was not split, or the model does not pass keyword arguments on to its attention: call "
    "model(**shard_batch(...)), or model.generate() in sharded_generation(model)"
)


def register(
    comm: tasp_coll.Communicator, name: str = "tasp", *, method: str = "auto", kv_bits: int | str | None = None
) -> None:
    """Make `attn_implementation=name` mean context-parallel attention over the ranks of `comm`.

    method, kv_bits: as in `attention.context_parallel_attention`; decoding sends no keys and goes by the exact ones of
    the cache. Registering a name again replaces it; models look it up at
    each call. Other names serve other communicators side by side. No mask is built. What a model asks for that split
    attention cannot do is an ArgumentError or a MismatchError on every rank, before data moves: padding, dropout,
    output_attentions, masks of one's own, chunked attention, RoPE whose frequencies depend on the length.
    """
    if not isinstance(comm, tasp_coll.Communicator):
        raise tasp_coll.ArgumentTypeError(f"comm must be a tasp_coll.Communicator, got {type(comm).__name__}")
    if method not in METHODS:
        raise refuse("method", f"be one of {', '.join(METHODS)}", repr(method))
    if Bits.of(kv_bits) and method == "ulysses":
        raise refuse("kv_bits", "be None with method 'ulysses'", repr(kv_bits))
    if name == "eager" or not isinstance(AttentionInterface().get(name), (TaspAttention, type(None))):
        raise refuse("name", "be free, or one that was registered here", repr(name))
    AttentionInterface.register(name, TaspAttention(comm, name, method, kv_bits))
    AttentionMaskInterface.register(name, _no_mask)


class TaspAttention:
    """The attention function of one registered name."""

    def __init__(self, comm: tasp_coll.Communicator, name: str, method: str, kv_bits: int | str | None) -> None:
        self.comm, self.name, self.method, self.kv_bits = comm, name, method, kv_bits

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        sharded_step: Step | None = None,
        held_tokens: int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """(batch, heads, local, head_dim) -> (batch, local, heads, head_dim), and no weights."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if torch.is_autocast_enabled(query.device.type):  # as torch's own attention does
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        layer = sharded_step.layer(module.layer_idx) if sharded_step is not None else None
        if sharded_step is not None and sharded_step.held is None:
            assert layer is not None
            out = decode(query, layer, sharded_step, window=sliding_window, scale=scale, comm=self.comm)
        else:
            held = held_tokens if sharded_step is None or sharded_step.held is None else len(sharded_step.held)
            self._check(module, held, _fault(module, attention_mask, dropout, sliding_window, others))
            out = self._attend(query, key, value, scale, sliding_window, held or 0, cu_seq_lens_q)
        if layer is not None and sliding_window is not None:
            layer.forget(layer.seen - sliding_window + 1)
        return out.transpose(1, 2).contiguous(), None

    def _check(self, module: Any, held: int | None, problem: str | None) -> None:
        """Once in a forward call the ranks agree that all can go on."""
        if module.layer_idx == _first_layer(module.config):
            problem = _WHOLE if held is None else problem
            where = f"attention {self.name!r}"
            agree(self.comm, where, {}, tasp_coll.ArgumentError(f"{where}: {problem}") if problem else None)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        held: int,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """On `held` local tokens; the result of the one that stands in for none is 0."""
        total = query.shape[2]
        query, key, value = query[:, :, :held], key[:, :, :held], value[:, :, :held]
        out = context_parallel_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            comm=self.comm,
            cu_seqlens=cu_seqlens,
            window=window,
            method=self.method,
            kv_bits=self.kv_bits,
        )
        return out if out.shape[2] == total else torch.nn.functional.pad(out, (0, 0, 0, total - out.shape[2]))


def _no_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """The mask interface: None, since windows and causality need no mask; a padding mask, for attention to refuse."""
    if use_vmap:
        raise tasp_coll.ArgumentError("this model adds a mask function of its own, which split attention cannot apply")
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise tasp_coll.ArgumentError(f"chunked attention, here of {local_size} tokens, cannot be split over ranks")
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


def _fault(module: Any, mask: Tensor | None, dropout: float, window: int | None, others: dict[str, Any]) -> str | None:
    """What a model asks for that split attention cannot do."""
    if mask is not None:
        return (
            "attention_mask must be (batch, tokens) and hide no token: leave padding out, batch sequences of one "
            "length, or pack documents into one sequence with shard_batch(..., cu_seqlens=...)"
        )
    if dropout:
        return f"attention dropout must be 0, got {dropout}: set config.attention_dropout = 0.0, or call model.eval()"
    if others.get("output_attentions"):
        return "output_attentions must be False: weights are never whole on a rank; use attn_implementation='eager'"
    if not (module.is_causal if others.get("is_causal") is None else others["is_causal"]):
        return "only causal attention is registered: call attention.context_parallel_attention for others"
    for name in _OTHER_ATTENTION:
        if others.get(name) is not None:
            return f"this model's attention uses {name}, which is not there: use attn_implementation='eager'"
    return _config_fault(module.config, module.layer_idx, window)


def _first_layer(config: Any) -> int:
    """Number of the first layer that has attention."""
    kinds = getattr(config, "layer_types", None) or ()
    return next((layer for layer, kind in enumerate(kinds) if kind in _ATTENTION), 0)


def _config_fault(config: Any, layer: int, window: int | None) -> str | None:
    """What a model's configuration asks for."""
    kinds = getattr(config, "layer_types", None) or ()
    mixing = sorted({*kinds} - {*_ATTENTION, *_TOKEN_BY_TOKEN})
    if mixing:
        return f"layers of type {', '.join(mixing)} mix tokens without attention, and see only this rank's"
    slides = kinds[layer] == "sliding_attention" if kinds else getattr(config, "sliding_window", None) is not None
    if slides and window is None:
        return "this model keeps its sliding window to itself: only those that pass sliding_window on can be split"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        kind = rope["rope_type"]
        return (
            f"rope_type {kind!r} depends on the length of a call, of which a rank sees a part: use 'yarn' or 'llama3'"
        )
    return None
