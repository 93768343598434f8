"""How each method is called: ours, and the peers that it is compared with."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import attention
import tasp_coll
from attention_options import COMPUTE, OURS, QUANTIZED, Options, label
from perf_algorithms import join_gloo
from perf_collective import Unsupported

if TYPE_CHECKING:
    from mpi4py import MPI


class Method(ABC):
    """One entry of --method. `recorded`: it says where its time goes."""

    recorded = True

    kv_bits: int | str | None = None  # with which keys and values travel

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options

    @property
    def label(self) -> str:
        """Its name in tables."""
        return label(self.name, self.kv_bits)

    @abstractmethod
    def positions(self) -> Tensor:
        """Where this rank's tokens are in the sequence, ascending."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """This rank's tokens (B, H, L, D), keys and values (B, Hkv, L, D) -> (B, H, L, D), differentiable."""


class Ours(Method):
    """`context_parallel_attention`."""

    def __init__(
        self, name: str, options: Options, comm: tasp_coll.Communicator, kv_bits: int | str | None = None
    ) -> None:
        super().__init__(name, options)
        self._comm, self.kv_bits = comm, kv_bits

    def positions(self) -> Tensor:
        return attention.sequence_indices(self.options.seq_len, comm=self._comm, is_causal=self.options.causal)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.context_parallel_attention(
            query,
            key,
            value,
            is_causal=self.options.causal,
            enable_gqa=True,
            comm=self._comm,
            window=self.options.window,
            method=OURS[0] if self.name == COMPUTE else self.name,
            kv_bits=self.kv_bits,
        )


class Contiguous(Method):
    """A peer whose shards are equal runs of tokens."""

    recorded = False

    def __init__(self, name: str, options: Options, world: MPI.Intracomm) -> None:
        super().__init__(name, options)
        self.rank, self.size = world.rank, world.size
        if options.seq_len % world.size:
            raise Unsupported(f"{name} needs --seq-len to be a multiple of {world.size} ranks, got {options.seq_len}")
        if options.window is not None:
            raise Unsupported(f"{name} has no --window")
        self.distributed = join_gloo(world, options.timeout)

    def positions(self) -> Tensor:
        length = self.options.seq_len // self.size
        return torch.arange(self.rank * length, (self.rank + 1) * length)


class Sdpa(Contiguous):
    """All keys and values by gloo, then torch's own attention."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (_Gathered.apply(x, self.distributed) for x in (key, value))
        mask = None
        if self.options.causal:
            mask = self.positions()[:, None] >= torch.arange(self.options.seq_len)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, distributed: Any) -> Tensor:
        ctx.distributed, ctx.length = distributed, x.shape[2]
        found = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(found, x)
        return torch.cat(found, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """gloo has no reduce-scatter in every version."""
        total = grad.contiguous().clone()
        ctx.distributed.all_reduce(total)
        start = ctx.distributed.get_rank() * ctx.length
        return total[:, :, start : start + ctx.length], None


class Ringmaster(Contiguous):
    """axolotl-ringmaster's ring over torch.distributed."""

    module, function = "p2p_attn", "ring_p2p_attention"

    def __init__(self, name: str, options: Options, world: MPI.Intracomm) -> None:
        try:
            call = getattr(importlib.import_module(f"ringmaster.ring.{self.module}"), self.function)
            missing = ""
        except (ImportError, AttributeError) as error:
            missing = f"{error}: pip install axolotl-ringmaster"
        told = [text for text in world.allgather(missing) if text]
        if told:
            raise Unsupported(f"ringmaster cannot be imported ({told[0]})")
        super().__init__(name, options, world)
        self._call = call

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found: Tensor = self._call(query, key, value, **self.how(query))
        return found.transpose(1, 2)

    def how(self, query: Tensor) -> dict[str, Any]:
        """The arguments beside the tensors."""
        group, scaling = self.distributed.group.WORLD, 1 / math.sqrt(query.shape[-1])
        return {"group": group, "scaling": scaling, "causal": self.options.causal}


class RingmasterZigzag(Ringmaster):
    """Its balanced ring, which runs on a CPU for packed documents only: here for one document."""

    module, function = "zigzag", "zigzag_ring_attention"

    def __init__(self, name: str, options: Options, world: MPI.Intracomm) -> None:
        if not options.causal:
            raise Unsupported(f"{name} needs --causal")
        super().__init__(name, options, world)
        if options.seq_len % (2 * world.size):
            raise Unsupported(f"{name} needs --seq-len to be a multiple of {2 * world.size}, got {options.seq_len}")

    def positions(self) -> Tensor:
        half = self.options.seq_len // (2 * self.size)
        pieces = self.rank, 2 * self.size - 1 - self.rank
        return torch.cat([torch.arange(piece * half, (piece + 1) * half) for piece in pieces])

    def how(self, query: Tensor) -> dict[str, Any]:
        bounds = torch.tensor([0, self.options.seq_len], dtype=torch.int32)
        return {"group": self.distributed.group.WORLD, "scaling": 1 / math.sqrt(query.shape[-1]), "cu_seqlens": bounds}


_PEERS: dict[str, type[Sdpa | Ringmaster]] = {
    "sdpa": Sdpa,
    "ringmaster": Ringmaster,
    "ringmaster-zigzag": RingmasterZigzag,
}


def assemble(
    options: Options, world: MPI.Intracomm, comm: tasp_coll.Communicator, silent: tasp_coll.Communicator
) -> list[Method]:
    """The methods that the user named, in that order, with each --kv-bits. Unsupported for what cannot be made."""

    def make(name: str) -> list[Method]:
        if name in _PEERS:
            return [_PEERS[name](name, options, world)]
        carrier = silent if options.silent or name == COMPUTE else comm
        return [Ours(name, options, carrier, bits) for bits in (options.kv_bits if name in QUANTIZED else (None,))]

    return [method for name in options.methods for method in make(name)]


def dismiss(methods: Sequence[Method]) -> None:
    """End what `assemble` began outside tasp_coll."""
    if any(isinstance(method, Contiguous) for method in methods):
        torch.distributed.destroy_process_group()
