"""Models spread over processes with FSDP2: each holds a slice of every weight, gradient and moment.

torch's `fully_shard` is called directly: accelerate's own way to it exists for GPUs only, and a path that the tests
cannot take on a CPU is not one to rely on. Each block of the model is a unit: its weights are gathered when it runs and
freed after it; what lies outside the blocks (embeddings, the head) forms one more unit. Weights are gathered in
their own dtype, so that fake quantization sees the float32 masters, and whole, so that scales of rows, groups or
tensors are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..base import console
from ..base.errors import ConfigError


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread the model over all processes, in place; its parameters become slices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                f"The parameter {name} is a scalar, which FSDP cannot spread.",
                fix="Train without fsdp, or give the parameter the shape [1].",
            )
    model.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = list(_blocks(model))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    console.log.info("FSDP over %d processes: %d blocks are units of their own.", mesh.size(), len(blocks))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _blocks(child)


def exchange(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Let the gradients of a backward pass wait for the next one, unless `now`."""
    model.set_requires_gradient_sync(now)  # type: ignore[operator]
    return nullcontext()


def whole(value: Tensor) -> Tensor:
    """Return the full tensor of which each process holds a slice; every process has to call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def fill(value: Tensor, content: Tensor) -> None:
    """Copy a full tensor into one that may be a slice."""
    value.copy_(like(value, content))


def like(value: Tensor, content: Tensor) -> Tensor:
    """Return this process's part of a full tensor, as `value` is held."""
    content = content.to(value.device)
    if not isinstance(value, DTensor):
        return content
    return distribute_tensor(content, value.device_mesh, value.placements, src_data_rank=None)


def collect(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Gather tensors one by one to memory of the CPU, in those processes that `keep` them."""
    kept = {}
    for name, value in tensors:
        full = whole(value)
        if keep:
            kept[name] = full.detach().contiguous().cpu()
    return kept


def whole_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Return the state of a model that may be spread; every process has to call this, those that `keep` it get it."""
    return collect(model.state_dict().items(), keep)
