"""Cases that every kernel computes, and the oracle: attention over a token mask, in float64, with repeated heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from angelslim.kernels.attention.blocks import BlockPlan, causal_blocks

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@dataclass(frozen=True)
class Shape:
    """One call; `real` are the first keys and the ones after the last of each row, where a batch is padded."""

    q_len: int = 80
    kv_len: int = 80
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (32, 32)
    block: int = 16
    density: float = 0.3
    batch: int = 2
    real: tuple[tuple[int, int], ...] = ()
    shared: bool = False


SHAPES = {
    "grouped": Shape(),
    "all blocks": Shape(density=1.0),
    "diagonal alone": Shape(density=0.0),
    "odd length": Shape(q_len=77, kv_len=77),
    "chunk": Shape(q_len=37, kv_len=90),
    "chunk of whole blocks": Shape(q_len=32, kv_len=96),
    "every head its keys": Shape(heads=(2, 2)),
    "one head of keys": Shape(heads=(4, 1), kv_len=61, q_len=61),
    "one list for all": Shape(shared=True),
}
PADDED = {
    "padded left": Shape(real=((0, 80), (37, 80))),
    "padded right": Shape(real=((0, 61), (0, 80)), density=1.0),
    "padded both": Shape(real=((5, 61), (16, 70)), q_len=77, kv_len=77),
}
WIDE = {  # what large models have
    "64 wide": Shape(dims=(64, 64), block=32, q_len=100, kv_len=100, batch=1),
    "128 wide": Shape(dims=(128, 128), block=64, q_len=100, kv_len=150, batch=1),
    "other values": Shape(dims=(64, 32), batch=1),
}


@dataclass(frozen=True)
class Tensors:
    """Inputs of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan
    start: Tensor | None
    stop: Tensor | None


def make(shape: Shape, dtype: torch.dtype, device: torch.device = DEVICE) -> Tensors:
    """Random inputs laid out as models do it, tokens before heads, and a random plan that keeps the diagonal."""
    torch.manual_seed(0)

    def values(length: int, heads: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, length, heads, dim).to(device, dtype).transpose(1, 2)

    q_offset = shape.kv_len - shape.q_len
    size = (shape.block, shape.block, q_offset, shape.kv_len)
    causal = causal_blocks(*size)
    lists = (1, 1) if shape.shared else (shape.batch, shape.heads[0])
    mask = (torch.rand(*lists, *causal.shape) < shape.density) & causal
    tokens = torch.arange(shape.q_len)
    mask[:, :, tokens // shape.block, (tokens + q_offset) // shape.block] = True
    plan = BlockPlan.from_mask(
        mask.to(device), block_q=shape.block, block_k=shape.block, q_offset=q_offset, kv_len=shape.kv_len
    )
    bounds = torch.tensor(shape.real, device=device).T if shape.real else (None, None)
    return Tensors(
        values(shape.q_len, shape.heads[0], shape.dims[0]),
        values(shape.kv_len, shape.heads[1], shape.dims[0]),
        values(shape.kv_len, shape.heads[1], shape.dims[1]),
        plan,
        *bounds,
    )


def oracle(case: Tensors, scaling: float) -> Tensor:
    """One token at a time: gather what it may read, softmax, sum. float64 on the CPU."""
    mask = case.plan.to_mask().cpu()
    mask = mask.expand(case.q.shape[0], case.q.shape[1], -1, -1)
    q, k, v = (x.double().cpu() for x in (case.q, case.k, case.v))
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    keys = torch.arange(k.shape[2])
    for b in range(q.shape[0]):
        real = torch.ones_like(keys, dtype=torch.bool)
        if case.start is not None and case.stop is not None:
            real = (keys >= case.start[b].cpu()) & (keys < case.stop[b].cpu())
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                read = mask[b, h, t // case.plan.block_q, keys // case.plan.block_k]
                read = read & (keys <= t + case.plan.q_offset) & real
                if read.any():
                    weights = (k[b, h // groups, read] @ q[b, h, t] * scaling).softmax(0)
                    out[b, h, t] = weights @ v[b, h // groups, read]
    return out
