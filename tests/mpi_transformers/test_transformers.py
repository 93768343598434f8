"""Unchanged models whose context is split over the ranks, against the same models in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from mpi4py import MPI
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

import tasp_coll
from attention import sequence_indices
from attention.transformers import (
    ShardedCache,
    global_loss,
    register,
    shard_batch,
    sharded_generation,
    sync_gradients,
)

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # so that attention matters, and tokens are far from ties
}
WINDOW = 9
KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=WINDOW)),
}
LENGTH = 23  # divides by no number of ranks
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def comm() -> Iterator[tasp_coll.Communicator]:
    with tasp_coll.Communicator(timeout=60) as found:
        register(found)
        yield found


@pytest.fixture(scope="module")
def one_less() -> Iterator[tasp_coll.Communicator | None]:
    """All ranks but the last, for which it is None: importing transformers once serves two numbers of ranks."""
    world = MPI.COMM_WORLD
    group = world.Split(int(world.rank == world.size - 1 > 0))
    if world.rank == world.size - 1 > 0:
        yield None
    else:
        with tasp_coll.Communicator(group, timeout=60) as found:
            register(found, "tasp-one-less")
            yield found
    group.Free()


class Pair(NamedTuple):
    """A model in one process, and the same one over all ranks."""

    plain: Any
    split: Any


@cache
def _pair(kind: str) -> Pair:
    made, config = KINDS[kind]
    torch.manual_seed(1)
    plain = made._from_config(copy.deepcopy(config), attn_implementation="sdpa").float()
    split = made._from_config(copy.deepcopy(config), attn_implementation="tasp").float()
    split.load_state_dict(plain.state_dict())
    return Pair(plain, split)


def pair(kind: str, name: str = "tasp") -> Pair:
    """Without gradients; `name` is that of the split model's attention."""
    found = _pair(kind)
    for model in found:
        model.train()
        model.zero_grad()
    found.split.set_attn_implementation(name)
    return found


def tokens(length: int = LENGTH, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """The same on all ranks; 0 is for padding."""
    return torch.randint(1, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def same_gradients(models: Pair, tolerance: float = 1e-4) -> None:
    for (name, want), got in zip(models.plain.named_parameters(), models.split.parameters(), strict=True):
        far = (got.grad - want.grad).abs().max().item()
        assert far <= tolerance * max(1.0, want.grad.abs().max().item()), name


def once(comm: tasp_coll.Communicator, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What one process finds, computed by rank 0 alone."""
    found = call() if comm.rank == 0 else torch.empty(0, dtype=torch.int64)
    shape = comm.decomposed_allgatherv(torch.tensor(found.shape if comm.rank == 0 else [], dtype=torch.int64))
    whole: torch.Tensor = comm.decomposed_allgatherv(found.reshape(-1))
    return whole.reshape(shape.tolist())


def same_on_all_ranks(comm: tasp_coll.Communicator, value: torch.Tensor) -> bool:
    return all(torch.equal(each, value) for each in comm.decomposed_allgather(value[None]))


# --- training


@pytest.mark.parametrize(
    "kind, length", [("llama", LENGTH), ("qwen2", LENGTH), ("qwen3", LENGTH), ("mistral", LENGTH), ("llama", 3)]
)
def test_logits_loss_and_gradients_are_those_of_one_process(
    comm: tasp_coll.Communicator, kind: str, length: int
) -> None:
    """Three tokens are fewer than the ranks."""
    check_training(comm, pair(kind), length)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gradients_on_one_rank_less(one_less: tasp_coll.Communicator | None, kind: str) -> None:
    if one_less is not None:
        check_training(one_less, pair(kind, "tasp-one-less"), LENGTH)


def check_training(comm: tasp_coll.Communicator, models: Pair, length: int) -> None:
    ids = tokens(length)
    want = models.plain(ids, labels=ids)
    want.loss.backward()
    got = models.split(**shard_batch(ids, ids, comm=comm))
    loss = global_loss(got.loss, comm=comm)
    loss.backward()
    sync_gradients(models.split, comm=comm, bucket_bytes=10_000)
    mine = sequence_indices(length, comm=comm)
    torch.testing.assert_close(got.logits[:, : len(mine)], want.logits[:, mine], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, want.loss, rtol=1e-4, atol=1e-4)
    same_gradients(models)
    assert same_on_all_ranks(comm, loss.detach())
    assert all(same_on_all_ranks(comm, each.grad) for each in models.split.parameters())


def test_names_bind_communicators_and_methods(comm: tasp_coll.Communicator) -> None:
    models, ids = pair("llama"), tokens()
    want = models.plain(ids, labels=ids).loss
    with tasp_coll.Communicator(timeout=60) as other:
        for name, used, method in (("tasp-ring", comm, "ring"), ("tasp-other", other, "allgather")):
            register(used, name, method=method)
            split = copy.deepcopy(models.split)
            split.set_attn_implementation(name)
            loss = global_loss(split(**shard_batch(ids, ids, comm=used)).loss, comm=used)
            torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    register(comm, "tasp-bits", kv_bits=8)
    models.split.set_attn_implementation("tasp-bits")
    few = global_loss(models.split(**shard_batch(ids, ids, comm=comm)).loss, comm=comm)
    torch.testing.assert_close(few, want, rtol=1e-2, atol=1e-2)
    assert (few != want) == (comm.size > 1)
    with pytest.raises(tasp_coll.ArgumentError, match="kv_bits must be None, an integer"):
        register(comm, "tasp-none", kv_bits=1)
    with pytest.raises(tasp_coll.ArgumentError, match="method must be one of auto, tasp"):
        register(comm, "tasp-none", method="none")
    with pytest.raises(tasp_coll.ArgumentError, match="name must be free"):
        register(comm, "sdpa")


@pytest.mark.parametrize("valid", [slice(1, 3), slice(0, 0)])
def test_labels_may_count_on_some_ranks_only_or_on_none(comm: tasp_coll.Communicator, valid: slice) -> None:
    models, ids = pair("llama"), tokens()
    labels = torch.full_like(ids, -100)
    labels[:, valid] = ids[:, valid]
    # the mean over no label is not a number: there 0 is wanted
    count = max(1, int((labels[:, 1:] != -100).sum()))
    want = models.plain(ids, labels=labels, num_items_in_batch=count).loss
    want.backward()
    loss = global_loss(models.split(**shard_batch(ids, labels, comm=comm)).loss, comm=comm)
    loss.backward()
    sync_gradients(models.split, comm=comm)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    same_gradients(models)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_packed_documents_do_not_see_each_other(comm: tasp_coll.Communicator, kind: str) -> None:
    models, ids = pair(kind), tokens(batch=1)
    cuts = [0, 2, 14, 15, LENGTH]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(cuts)])[None]
    shifted = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    shifted[:, torch.tensor(cuts[1:]) - 1] = -100
    want = models.plain(ids, position_ids=positions, labels=ids, shift_labels=shifted, use_cache=False)
    want.loss.backward()
    got = models.split(**shard_batch(ids, ids, comm=comm, cu_seqlens=torch.tensor(cuts)))
    global_loss(got.loss, comm=comm).backward()
    sync_gradients(models.split, comm=comm)
    mine = sequence_indices(LENGTH, comm=comm, cu_seqlens=torch.tensor(cuts))
    torch.testing.assert_close(got.logits[:, : len(mine)], want.logits[:, mine], rtol=1e-4, atol=1e-4)
    same_gradients(models)


def test_gradient_checkpointing_and_autocast(comm: tasp_coll.Communicator) -> None:
    models, ids = pair("llama"), tokens()
    losses = []
    for model in models:
        model.activation_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        losses.append(models.plain(ids, labels=ids, use_cache=False).loss)
        losses.append(global_loss(models.split(**shard_batch(ids, ids, comm=comm)).loss, comm=comm))
    for loss, model in zip(losses, models, strict=True):
        loss.backward()
        model.activation_checkpointing_disable()
    sync_gradients(models.split, comm=comm)
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=2e-2)
    norms = [torch.cat([each.grad.reshape(-1) for each in model.parameters()]).norm() for model in models]
    torch.testing.assert_close(norms[1], norms[0], rtol=5e-2, atol=5e-2)


# --- generation


@pytest.mark.parametrize("kind, length", [("llama", LENGTH), ("qwen2", LENGTH), ("mistral", LENGTH), ("mistral", 2)])
def test_fifty_greedy_tokens_are_those_of_one_process(comm: tasp_coll.Communicator, kind: str, length: int) -> None:
    """Two tokens are fewer than the ranks; Mistral's window is shorter than the prompt."""
    check_generation(comm, pair(kind), length)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_fifty_greedy_tokens_on_one_rank_less(one_less: tasp_coll.Communicator | None, kind: str) -> None:
    if one_less is not None:
        check_generation(one_less, pair(kind, "tasp-one-less"), LENGTH)


def check_generation(comm: tasp_coll.Communicator, models: Pair, length: int) -> None:
    ids = tokens(length)
    want = once(comm, lambda: models.plain.eval().generate(ids, max_new_tokens=50, **GREEDY))
    computed: list[int] = []  # tokens of each forward call
    embeddings = models.split.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[1]))
    with sharded_generation(models.split.eval()):
        got = models.split.generate(ids, max_new_tokens=50, return_dict_in_generate=True, output_logits=True, **GREEDY)
    hook.remove()
    assert torch.equal(got.sequences, want)
    assert computed == [max(1, len(sequence_indices(length, comm=comm))), *[1] * 49], "a rank computes its part"
    assert same_on_all_ranks(comm, torch.stack(got.logits))
    held = torch.tensor([[layer.keys.shape[-2] for layer in got.past_key_values.layers]])
    seen = got.past_key_values.get_seq_length()
    assert seen == length + 49
    parts = comm.decomposed_allgather(held)
    windowed = getattr(models.plain.config, "sliding_window", None) is not None
    assert (parts.sum(0) == (WINDOW - 1 if windowed else seen)).all(), "every token is kept once"
    if not windowed:
        assert int(parts.max() - parts.min()) <= 4, "the cache is balanced"


def test_sampling_and_beams_agree(comm: tasp_coll.Communicator) -> None:
    """Whatever the seeds were, rank 0's counts."""
    models, ids = pair("qwen2"), tokens()
    for how in ({"do_sample": True, "top_k": 20}, {"num_beams": 3, "do_sample": False}):
        torch.manual_seed(7)
        want = models.plain.eval().generate(ids, max_new_tokens=12, pad_token_id=0, **how)
        torch.manual_seed(7 + comm.rank)
        with sharded_generation(models.split.eval()):
            got = models.split.generate(ids, max_new_tokens=12, pad_token_id=0, **how)
        assert torch.equal(got, want), how


def test_generation_without_a_cache_and_from_embeddings(comm: tasp_coll.Communicator) -> None:
    models, ids = pair("llama"), tokens(7)
    want = models.plain.eval().generate(ids, max_new_tokens=6, **GREEDY)
    with sharded_generation(models.split.eval()):
        assert torch.equal(models.split.generate(ids, max_new_tokens=6, use_cache=False, **GREEDY), want)
        embeds = models.split.get_input_embeddings()(ids)
        assert torch.equal(models.split.generate(inputs_embeds=embeds, max_new_tokens=6, **GREEDY), want[:, 7:])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_cache_goes_on_with_a_longer_prompt(comm: tasp_coll.Communicator, kind: str) -> None:
    """The new part of the prompt is several tokens against a cache."""
    models, ids = pair(kind), tokens()
    caches: list[Any] = []
    found = []
    for model, inside in zip(models, (False, True), strict=True):
        model.eval()

        def both(model: Any = model) -> torch.Tensor:
            how = {"return_dict_in_generate": True, **GREEDY}
            first = model.generate(ids, max_new_tokens=4, **how)
            caches.append(first.past_key_values)
            longer = torch.cat([first.sequences, tokens(6, seed=2)], 1)
            chunked = model.generate(ids, max_new_tokens=4, prefill_chunk_size=10, **how)
            assert torch.equal(chunked.sequences, first.sequences)
            if kind == "llama":  # what has left a window cannot come back
                caches[-1].crop(-5)
            again: torch.Tensor = model.generate(
                longer, attention_mask=torch.ones_like(longer), past_key_values=caches[-1], max_new_tokens=8, **GREEDY
            )
            return again

        if inside:
            with sharded_generation(model):
                found.append(both())
        else:
            found.append(both())
    assert isinstance(caches[1], ShardedCache)
    assert torch.equal(found[1], found[0])


def test_bfloat16_generates_the_same_on_all_ranks(comm: tasp_coll.Communicator) -> None:
    model = copy.deepcopy(pair("llama").split).eval().to(torch.bfloat16)
    with sharded_generation(model):
        got = model.generate(tokens(), max_new_tokens=8, **GREEDY)
    assert same_on_all_ranks(comm, got)


def test_one_rank_alone() -> None:
    models, ids = pair("qwen3"), tokens()
    with tasp_coll.Communicator(MPI.COMM_SELF, timeout=60) as alone:
        register(alone, "tasp-alone")
        split = copy.deepcopy(models.split)
        split.set_attn_implementation("tasp-alone")
        want = models.plain(ids, labels=ids).loss
        got = global_loss(split(**shard_batch(ids, ids, comm=alone)).loss, comm=alone)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        with sharded_generation(split.eval()):
            tail = split.generate(ids, max_new_tokens=8, **GREEDY)
        assert torch.equal(tail, models.plain.eval().generate(ids, max_new_tokens=8, **GREEDY))


# --- errors, on every rank


def refused(comm: tasp_coll.Communicator, call: Callable[[], object], told: str) -> None:
    with pytest.raises(tasp_coll.CollectiveError, match=told):
        call()
    assert comm.decomposed_allreduce(torch.ones(1)).item() == comm.size, "the communicator works on"


def test_what_cannot_be_split_is_refused(comm: tasp_coll.Communicator) -> None:
    model, ids = pair("llama").split, tokens()
    batch = shard_batch(ids, ids, comm=comm)
    mask = torch.ones_like(batch["input_ids"])
    model(**batch, attention_mask=mask)
    if comm.rank == comm.size - 1:
        mask[0, 0] = 0  # the others learn of it
    refused(comm, lambda: model(**batch, attention_mask=mask), "hide no token.*cu_seqlens")
    refused(comm, lambda: model(**batch, output_attentions=True), "output_attentions must be False")
    refused(comm, lambda: model(ids), r"shard_batch\(...\)")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    refused(comm, lambda: model(**batch), "attention dropout must be 0, got 0.1: set config.attention_dropout")
    model.eval()(**batch)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0


def test_models_that_keep_their_attention_to_themselves_are_refused(comm: tasp_coll.Communicator) -> None:
    config = StableLmConfig(**SHAPE)  # passes no keyword arguments on
    model = StableLmForCausalLM._from_config(config, attn_implementation="tasp")
    batch = shard_batch(tokens(), comm=comm)
    refused(comm, lambda: model(**batch), "does not pass keyword arguments on")
    refused(comm, lambda: sync_gradients(model, comm=comm), "StableLmForCausalLM does not take its attention")
    with pytest.raises(tasp_coll.ArgumentError, match="StableLmForCausalLM does not"), sharded_generation(model):
        pass


def test_layers_that_mix_tokens_without_attention_are_refused(comm: tasp_coll.Communicator) -> None:
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="tasp")
    model.config.layer_types = ["linear_attention", "full_attention"]  # as hybrids have
    batch = shard_batch(tokens(), comm=comm)
    refused(comm, lambda: model(**batch), "layers of type linear_attention mix tokens without attention")


def test_rope_that_depends_on_the_length_is_refused(comm: tasp_coll.Communicator) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(**SHAPE, rope_parameters=rope)
    model = LlamaForCausalLM._from_config(config, attn_implementation="tasp")
    batch = shard_batch(tokens(), comm=comm)
    refused(comm, lambda: model(**batch), "rope_type 'dynamic'")


def test_shard_batch_checks_its_arguments(comm: tasp_coll.Communicator) -> None:
    ids = tokens()
    refused(
        comm, lambda: shard_batch(tokens(seed=comm.rank), comm=comm), r"rank \d passed input_ids=\(2, 23\) of checksum"
    )
    refused(comm, lambda: shard_batch(ids[0], comm=comm), r"input_ids must be \(batch, total\)")
    refused(comm, lambda: shard_batch(ids, ids[:, 1:], comm=comm), "labels must have input_ids' shape")
    refused(comm, lambda: shard_batch(ids, comm=comm, cu_seqlens=[0, 5]), "cu_seqlens must rise from 0 to the 23")
    if comm.size > 1:
        odd = ids[:, 1:] if comm.rank == 1 else ids
        refused(
            comm, lambda: shard_batch(ids, odd, comm=comm), "rank 1 was called with a bad argument: labels must have"
        )


def test_generation_refuses_what_it_cannot_split(comm: tasp_coll.Communicator) -> None:
    models, ids = pair("llama"), tokens()
    model = models.split.eval()
    with pytest.raises(tasp_coll.ArgumentError, match="attn_implementation='sdpa'"), sharded_generation(models.plain):
        pass
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    with sharded_generation(model):
        refused(
            comm,
            lambda: model.generate(ids, max_new_tokens=3, attention_mask=padded, **GREEDY),
            "prompts must not be padded",
        )
        refused(comm, lambda: model.generate(tokens(seed=comm.rank), max_new_tokens=3, **GREEDY), "passed prompt=")
        refused(
            comm,
            lambda: model.generate(ids, max_new_tokens=3, cache_implementation="static", **GREEDY),
            "cache_implementation out",
        )
        refused(comm, lambda: model(ids, labels=ids), "labels are for training")
        with sharded_generation(model):
            refused(comm, lambda: model.generate(ids, max_new_tokens=3, **GREEDY), "inside sharded_generation already")
    refused(comm, lambda: model.generate(ids, max_new_tokens=3, **GREEDY), r"sharded_generation\(model\)")
