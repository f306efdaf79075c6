"""XAttention: antidiagonal sums of strided tiles estimate how much mass a block has (arXiv 2503.16428).

An S x S tile of the score map is judged by its antidiagonal: ``sum_p q[aS+S-1-p] . k[cS+p]``, which crosses every vertical
and every slash of the tile. All tiles of a strip of S queries are one product of inner size ``S * D``, so the estimate costs
1 / (2 S) of dense attention. The sums, divided by ``S * norm``, go through a causal softmax over the tiles of a row and are
added up in blocks. Each row of blocks then keeps the fewest blocks that hold the share `threshold` of its mass, the first
and the diagonal block before all others.

The paper's code with no GPU kernel forgot all far tiles where the prompt was a multiple of its chunk, and its sink kept a row
instead of a column; here causality is one comparison of positions, and the sink is a column. Tiles with padding are judged
by the pairs they have. The map is made one strip of query blocks at a time, of at most `CELLS` cells, with no tiles after its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....base.errors import ConfigError
from .._budget import keep_density, keep_mass
from .._layout import real_keys, real_queries
from .._options import Option, Settings
from .._scores import products, softmax_where, split, token_blocks
from ..plan import BlockPlan, Context, finish

CELLS = 2**26
KNOWN = {
    "threshold": Option(0.9, float, 0.0, 1.0, heads=True),
    "stride": Option(8, int, 1),
    "norm": Option(1.0, float, 1e-6),
}


class XAttention:
    """Options: `threshold`, `stride` (tokens, divides the block), `norm`, `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("xattention", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep the blocks with the most estimated mass."""
        stride = self.settings.one("stride", ctx)
        if ctx.block % stride:
            raise ConfigError(
                f"XAttention's stride {stride} does not divide the block of {ctx.block} tokens.",
                fix="Choose a stride that does.",
            )
        score = antidiagonal_masses(q, k, ctx, stride, self.settings.one("norm", ctx))
        density = self.settings.density(ctx, q.shape[1])
        if density is None:
            return finish(keep_mass(score, ctx, self.settings.column("threshold", ctx, q)), ctx)
        return finish(keep_density(score, ctx, density), ctx)


def antidiagonal_masses(q: Tensor, k: Tensor, ctx: Context, stride: int, norm: float = 1.0) -> Tensor:
    """The estimated mass of each block, float32 [B, H, nQ, nK]; each strip of `stride` queries adds one to its row."""
    asked, keys = real_queries(ctx, q.device), real_keys(ctx, q.device)
    tiles_k = _tiles(k, keys, stride)
    columns = tiles_k.shape[2]
    per_block = ctx.block // stride
    cells = q.shape[0] * q.shape[1] * per_block * columns
    step = max(CELLS // cells, 1) * ctx.block
    whole = asked is None and ctx.keys % stride == 0
    if asked is None:
        asked = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    if keys is None:
        keys = torch.ones(1, ctx.keys, dtype=torch.bool, device=q.device)
    found_k = _tiles(keys[:, None, :, None].float(), None, stride)
    rows = []
    for first in range(0, q.shape[2], step):
        part = slice(first, min(first + step, q.shape[2]))
        tiles_q = _tiles(q[:, :, part], asked[:, part], stride, backwards=True)
        begin = ctx.q_offset + first + torch.arange(tiles_q.shape[2], device=q.device) * stride
        seen = min(-(-(ctx.q_offset + part.stop) // stride), columns)
        allowed = torch.arange(seen, device=q.device) * stride <= begin[:, None]
        scores = products(tiles_q * (ctx.scaling / norm), tiles_k[:, :, :seen])
        full = whole and (part.stop - first) % stride == 0
        if full:
            scores = scores / stride
        else:
            flags = _tiles(asked[:, None, part, None].float(), None, stride, backwards=True)
            pairs = products(flags, found_k[:, :, :seen])
            scores, allowed = scores / pairs.clamp_min(1), allowed & (pairs > 0)
        mass = softmax_where(scores, allowed, all_full=full)
        mass = F.pad(mass, (0, columns + -columns % per_block - seen))
        mass = split(mass, 3, per_block).sum(-1)
        mass = F.pad(mass, (0, 0, 0, -mass.shape[2] % per_block))
        rows.append(split(mass, 2, per_block).sum(3))
    return torch.cat(rows, 2)


def _tiles(x: Tensor, real: Tensor | None, stride: int, backwards: bool = False) -> Tensor:
    """Join `stride` tokens of x [B, H, L, D] into one vector, [B, H, L / stride, stride * D]; what is not real is 0."""
    if real is not None:
        x = x * real[:, None, :, None]
    x = token_blocks(x, stride)
    return (x.flip(3) if backwards else x).flatten(3)


SELECTOR = XAttention
