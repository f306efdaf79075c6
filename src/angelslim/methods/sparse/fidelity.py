"""What a plan loses, head by head: the attention mass that it does not read, and the error of the outputs.

Both compare with dense attention on the very same queries, keys and values, one block of queries at a time:

* *mass*: the share of the softmax weight that lies in the keys the plan reads, averaged over the queries;
* *error*: the norm of the difference of both outputs over the norm of the dense output, over all queries of the head.

What earlier layers lost is in the inputs already, so a layer's figures are its own. It costs as much as dense attention
written out: for measurements, not for serving. Sums are in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._scores import split
from .plan import BlockPlan, Context


@dataclass(frozen=True)
class Fidelity:
    """One call of one layer; a value a query head, float64 [H], averaged over batch rows."""

    density: Tensor
    mass: Tensor
    error: Tensor


def compare(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, ctx: Context) -> Fidelity:
    """Measure a plan for q [B, H, Lq, D], k [B, Hkv, Lk, D] and v [B, Hkv, Lk, Dv] without padding."""
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    columns = torch.arange(plan.kv_len, device=q.device)
    listed = plan.to_mask().to(q.device)
    keys, values = k.float().transpose(-1, -2)[:, :, None], v.float()[:, :, None]
    mass, lost, norm = (torch.zeros(heads, dtype=torch.float64, device=q.device) for _ in range(3))
    for row in range(plan.rows):
        tokens = slice(row * plan.block_q, min((row + 1) * plan.block_q, plan.q_len))
        asked = split(q[:, :, tokens].float(), 1, groups)
        places = torch.arange(tokens.start, tokens.stop, device=q.device)[:, None] + plan.q_offset
        scores = (asked @ keys * ctx.scaling).flatten(1, 2).masked_fill(columns > places, -torch.inf)
        weights = scores.softmax(-1)
        kept = listed[:, :, row, None].repeat_interleave(plan.block_k, -1)[..., : plan.kv_len]
        part = weights * kept
        share = part.sum(-1, keepdim=True)
        mass += share.double().sum((0, 2, 3))
        dense, sparse = (
            (split(each, 1, groups) @ values).flatten(1, 2)
            for each in (weights, part / share.clamp_min(1e-30))
        )
        lost += (sparse - dense).double().square().sum((0, 2, 3))
        norm += dense.double().square().sum((0, 2, 3))
    density = plan.kept().mean(0).expand(heads)
    return Fidelity(density, mass / (q.shape[0] * plan.q_len), (lost / norm.clamp_min(1e-60)).sqrt())
