"""DTensor, DDP and FSDP2, unchanged, over ours and over gloo."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tasp_coll.torch_backend import TaspGroup

VOCABULARY, WIDTH, LENGTH, STEPS = 50, 32, 12, 4
Group = dist.ProcessGroup


class Transformer(nn.Module):
    """Two layers, of sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 70, dropout=0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        out: Tensor = self.head(hidden)
        return out


def train(wrap: Callable[[Transformer], nn.Module]) -> tuple[list[float], list[Tensor]]:
    """The losses of this rank and the weights, whole."""
    torch.manual_seed(7)
    model = wrap(Transformer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(dist.get_rank()), []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (3, LENGTH + 1), generator=generator)
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def sharded(model: Transformer, group: Group) -> nn.Module:
    """FSDP2."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS: dict[str, Callable[[Transformer, Group], nn.Module]] = {
    "ddp": lambda model, group: DistributedDataParallel(model, process_group=group, bucket_cap_mb=0.02),
    "fsdp2": sharded,
}


@pytest.mark.parametrize("kind", list(WRAPS))
def test_training_is_that_over_gloo(kind: str, gloo: Group) -> None:
    world = dist.group.WORLD
    assert isinstance(world, TaspGroup)
    before = world.carried
    losses, weights = train(lambda model: WRAPS[kind](model, world))
    assert world.carried >= before + STEPS
    wanted_losses, wanted = train(lambda model: WRAPS[kind](model, gloo))
    assert losses[0] == wanted_losses[0]  # nothing was summed yet: what was gathered is the same, bit for bit
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-5)
    if kind == "ddp":  # every rank adds up to the same bits
        flat = torch.cat([x.flatten() for x in weights])
        first = flat.clone()
        dist.broadcast(first, 0)
        assert torch.equal(flat, first)


def test_dtensors_redistribute() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (size,))
    group = mesh.get_group()
    assert isinstance(group, TaspGroup)
    before = group.carried
    torch.manual_seed(3)
    whole = torch.randn(2 * size + 1, 3)
    shards = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(shards.redistribute(mesh, [Replicate()]).to_local(), whole)
    assert group.carried > before
    part = DTensor.from_local(torch.full((size, 2), float(rank)), mesh, [Partial()])
    total = size * (size - 1) / 2
    assert torch.equal(part.redistribute(mesh, [Replicate()]).to_local(), torch.full((size, 2), total))
    assert torch.equal(part.redistribute(mesh, [Shard(0)]).to_local(), torch.full((1, 2), total))
    product = shards.T @ shards
    torch.testing.assert_close(product.full_tensor(), whole.T @ whole)


def test_a_mesh_of_two_dimensions() -> None:
    """Hybrid sharding: gathered in rows, summed in columns."""
    size = dist.get_world_size()
    if size % 2:
        pytest.skip("ranks do not make a rectangle")
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards"))
    losses, weights = train(lambda model: fully_shard(model, mesh=mesh))
    wanted_losses, wanted = train(lambda model: WRAPS["ddp"](model, dist.group.WORLD))
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-5)
