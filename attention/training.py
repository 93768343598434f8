"""Training a language model on one context that is split over the ranks: batches, loss and gradients.

batch = shard_batch(input_ids, input_ids, comm=comm)       # every rank passes the whole batch and gets its part
loss = global_loss(model(**batch).loss, comm=comm)         # the mean over all ranks' tokens, on every rank
loss.backward()
sync_gradients(model, comm=comm)                           # now the same as a single process's gradients
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tasp_coll
from attention.agreement import agree, refuse
from attention.sequence import sequence_indices

IGNORED = -100  # the label of a token that has no next token, and of those that count for nothing
BUCKET_BYTES = 32 << 20


def shard_batch(
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    comm: tasp_coll.Communicator,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> dict[str, Any]:
    """This rank's part of a batch, as keyword arguments of a causal language model: `model(**shard_batch(...))`.

    input_ids: (batch, total), the whole batch, the same on all ranks. labels: (batch, total), as transformers takes
    them, that is, not shifted; usually input_ids itself; -100 counts for nothing. cu_seqlens: boundaries of packed
    documents, (documents + 1,), from 0 to total.

    The result has `input_ids` and `position_ids` (batch, local), positions being those of the whole sequence, or of
    the document, and with labels: `labels` and `shift_labels` (batch, local), each token's label being the next
    token's, -100 at the end of the sequence and of each document, and `num_items_in_batch`, how many labels count
    over all ranks, so that the model's own loss is this rank's share of the mean. `held_tokens` and, for documents,
    `cu_seq_lens_q` are for attention: without them it refuses, lest a batch that was not split go unnoticed. A rank
    that holds no token gets one whose attention is left out and whose label is -100: models cannot run on none.

    Raises MismatchError on every rank if they passed different batches, ArgumentError for shapes that do not fit.
    """
    cuts = None if cu_seqlens is None else torch.as_tensor(cu_seqlens).detach().cpu().long()
    described: dict[str, object] = {
        "input_ids": digest(input_ids),
        "labels": digest(labels),
        "cu_seqlens": digest(cuts),
    }
    agree(comm, "shard_batch", described, _fault(input_ids, labels, cuts))
    mine = sequence_indices(input_ids.shape[1], comm=comm, cu_seqlens=cuts).to(input_ids.device)
    positions = _positions(input_ids.shape[1], cuts).to(input_ids.device)
    batch: dict[str, Any] = {
        "input_ids": _take(input_ids, mine, 0),
        "position_ids": _take(positions[None], mine, 0).expand(len(input_ids), -1),
        "use_cache": False,
        "held_tokens": len(mine),
    }
    if labels is not None:
        shifted = _shifted(labels, cuts)
        batch["labels"] = batch["shift_labels"] = _take(shifted, mine, IGNORED)
        batch["num_items_in_batch"] = max(1, int((shifted != IGNORED).sum()))
    if cuts is not None:
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = cuts
    return batch


def global_loss(share: Tensor, *, comm: tasp_coll.Communicator) -> Tensor:
    """The sum of all ranks' shares, the same on all of them; its gradient goes to this rank's own share.

    share: (), what a model's loss is for a batch of `shard_batch`: this rank's sum over the number of all labels.
    """
    if share.dim() != 0:
        raise tasp_coll.ArgumentError(f"share must be a loss of shape (), got {tuple(share.shape)}")
    total: Tensor = _Total.apply(share, comm)
    return total


def sync_gradients(model: nn.Module, *, comm: tasp_coll.Communicator, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Replace every parameter's gradient by its sum over the ranks, bit for bit the same on all of them.

    A parameter that no rank has a gradient for keeps None; one that only some have counts as 0 on the others.
    Gradients travel flattened, about `bucket_bytes` at a time, and bfloat16 and float16 add up in float32. With
    `global_loss` the sums are the single-process model's gradients, and need no division.
    """
    if getattr(model, "_supports_attention_backend", True) is False:  # of transformers: others have no such mark
        raise tasp_coll.ArgumentError(f"{type(model).__name__} does not take its attention from AttentionInterface")
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not wanted:
        return
    held = torch.tensor([parameter.grad is not None for parameter in wanted], dtype=torch.uint8)
    anywhere = comm.decomposed_allreduce(held, op="max").tolist()
    shared = [parameter for parameter, some in zip(wanted, anywhere, strict=True) if some]
    for parameter in shared:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in shared if parameter.grad is not None], bucket_bytes):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        comm.decomposed_allreduce(flat, flat)
        for grad, summed in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(summed.view_as(grad))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, comm: tasp_coll.Communicator) -> Tensor:
        total: Tensor = comm.decomposed_allreduce(share.detach().reshape(1))
        return total.reshape(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def digest(tensor: Tensor | None) -> str:
    """Shape and checksum of a tensor's bytes, to tell whether ranks have the same."""
    if tensor is None:
        return "None"
    held = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return f"{tuple(tensor.shape)} of checksum {zlib.crc32(held.numpy().tobytes()):08x}"


def _fault(input_ids: Tensor, labels: Tensor | None, cuts: Tensor | None) -> tasp_coll.ArgumentError | None:
    """What is wrong with the arguments of `shard_batch`."""
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        return refuse("input_ids", "be (batch, total) with a token at least", tuple(input_ids.shape))
    if labels is not None and labels.shape != input_ids.shape:
        return refuse("labels", f"have input_ids' shape {tuple(input_ids.shape)}", tuple(labels.shape))
    total = input_ids.shape[1]
    if cuts is not None and not (
        cuts.dim() == 1 and len(cuts) > 1 and cuts[0] == 0 and cuts[-1] == total and bool((cuts.diff() >= 0).all())
    ):
        return refuse("cu_seqlens", f"rise from 0 to the {total} tokens of input_ids", cuts.tolist())
    return None


def _positions(total: int, cuts: Tensor | None) -> Tensor:
    """(total,): every token's position in the sequence, or in its document."""
    places = torch.arange(total)
    if cuts is None:
        return places
    return places - cuts[torch.bucketize(places, cuts, right=True) - 1]


def _shifted(labels: Tensor, cuts: Tensor | None) -> Tensor:
    """Every token's label is the next token's; the last of the sequence and of each document has none."""
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    if cuts is not None:
        ends = cuts[1:] - 1
        shifted[:, ends[ends >= 0].to(labels.device)] = IGNORED
    return shifted


def _take(whole: Tensor, mine: Tensor, filler: int) -> Tensor:
    """This rank's columns, or one of `filler` if there are none."""
    return whole.index_select(1, mine) if len(mine) else whole.new_full((len(whole), 1), filler)


def _buckets(grads: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Gradients of one dtype together, each list of at most `limit` bytes or of one gradient."""
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        bucket: list[Tensor] = []
        size = 0
        for grad in (each for each in grads if each.dtype == dtype):
            if bucket and size + grad.nbytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.nbytes
        if bucket:
            yield bucket
