"""Stem: blocks by score and by what their values add, with fewer of them for late rows (arXiv 2603.06274).

**Output-aware metric** (`oam`). The logit of a pair of blocks is the plain mean of XAttention's antidiagonal scores over the
block's tiles, without a softmax, plus ``lambda * max(z, 0)``: z is the logarithm of the largest value norm of each group
of S keys, standardised over the prompt's groups, and averaged over the block. The mean is linear, so it need not be
taken over a map of tiles: it is the sum over p of the products of the block's mean query number ``S-1-p`` with its mean key
number p, one product of inner size ``S * D`` for each pair of blocks. The result is the same and costs ``(b / S)^2`` times less.

**Token position decay** (`tpd`). Early tokens feed all later ones, so their rows keep more: with n blocks in the prompt the
first k0 rows are dense, and the counts of the others fall from k0 to ``alpha * k0``. Without `keep_ratio`, k0 is n below 56
blocks, ``0.2 n + 30`` below 160 and ``0.1 n + 30`` from there on; with it k0 is that share of n (the public code reads
a ratio and then uses the length rule all the same). n is that of the whole prompt, so chunks get the counts they would get
at once. The first `initial_blocks` and the last `window_blocks` come on top, and the first `dense_layers` layers are dense.

At a density the counts keep their decay, k0 is solved for, and the blocks kept in any case are only those every method
keeps, unless the two options are given. Details are those of its public code.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ....base.errors import ConfigError
from ....kernels.selection import fused
from .._budget import decayed, keep_count, keep_density
from .._fused import counts, forced, power, ready
from .._layout import Always, allowed_blocks, forced_blocks, prompt_spans, real_keys, real_queries
from .._options import Option, Settings
from .._scores import block_means, blocks_of, per_head, products, split, token_blocks
from ..plan import BlockPlan, Context, finish

KNOWN = {
    "keep_ratio": Option(None, float, 0.0, 1.0),
    "alpha": Option(0.7, float, 0.0, 1.0),
    "lambda": Option(0.2, float, 0.0),
    "stride": Option(8, int, 1),
    "norm": Option(1.0, float, 1e-6),
    "tpd": Option(True, bool),
    "oam": Option(True, bool),
    "initial_blocks": Option(None, int, 1),
    "window_blocks": Option(None, int, 1),
    "dense_layers": Option(2, int, 0),
}
NATIVE_BLOCKS = 4  # of the sink and of the window


class Stem:
    """Options: see the module; `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("stem", options, KNOWN)

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep each row's best blocks by the output-aware metric, as many as the row's place allows."""
        one = self.settings.one
        density = self.settings.density(ctx, q.shape[1])
        stride, alpha = one("stride", ctx), one("alpha", ctx) if one("tpd", ctx) else 1.0
        if ctx.block % stride:
            raise ConfigError(
                f"Stem's stride {stride} does not divide the block of {ctx.block} tokens.",
                fix="Choose a stride that does.",
            )
        if density is None and one("keep_ratio", ctx) is None and ctx.layer < one("dense_layers", ctx):
            return finish(allowed_blocks(ctx, q.device).expand(q.shape[0], q.shape[1], -1, -1), ctx)
        blocks = 1 if density is not None else NATIVE_BLOCKS
        always = Always(one("initial_blocks", ctx) or blocks, one("window_blocks", ctx) or blocks)
        if density is not None and power(stride) and ready(q, k, v, ctx):
            return self._fused(q, k, v, ctx, density, always, alpha)
        logits = block_logits(q, k, ctx, stride, one("norm", ctx))
        if one("oam", ctx) and one("lambda", ctx):
            logits = (
                logits + one("lambda", ctx) * per_head(value_bonus(v, ctx, stride), q.shape[1])[:, :, None]
            )
        if density is not None:
            return finish(keep_density(logits, ctx, density, always, (alpha,)), ctx)
        count, widest = _counts(ctx, one("keep_ratio", ctx), alpha, q.device)
        return finish(keep_count(logits, ctx, count, widest) | forced_blocks(ctx, q.device, always), ctx)

    def _fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: Context,
        density: tuple[float, ...],
        always: Always,
        alpha: float,
    ) -> BlockPlan:
        """The same at a density by GPU programs; the means are rounded to the dtype of q and k."""
        one = self.settings.one
        stride, weight = one("stride", ctx), one("lambda", ctx) if one("oam", ctx) else 0.0
        phases_q = fused.means(q, ctx.block, stride, phases=True, flip=True)
        phases_k = fused.means(k, ctx.block, stride, phases=True)
        count, widest = counts(ctx, density, q.device, always, (alpha,))
        return fused.choose(
            fused.products(phases_q.flatten(3), phases_k.flatten(3)),
            count,
            widest,
            block=ctx.block,
            q_offset=ctx.q_offset,
            forced=forced(ctx, always),
            factor=ctx.scaling / one("norm", ctx) / stride,
            bonus=fused.value_bonus(v, ctx.block, stride) if weight else None,
            weight=weight,
        )


def block_logits(q: Tensor, k: Tensor, ctx: Context, stride: int, norm: float = 1.0) -> Tensor:
    """The mean antidiagonal score of each pair of blocks, factorised; float32 [B, H, nQ, nK].

    Where a block is short or has padding, the mean is over the tokens it has, for each p by itself, and then over the p
    that both blocks have.
    """
    phases_q = _phases(q, real_queries(ctx, q.device), ctx.block, stride)
    phases_k = _phases(k, real_keys(ctx, k.device), ctx.block, stride)
    total = products(phases_q[0].flip(3).flatten(3), phases_k[0].flatten(3))
    shared = products(phases_q[1].flip(3), phases_k[1])
    return total * (ctx.scaling / norm) / shared.clamp_min(1)


def _phases(x: Tensor, real: Tensor | None, block: int, stride: int) -> tuple[Tensor, Tensor]:
    """The mean of every `stride`-th token of each block, [B, H, n, stride, D], and whether there is any, [B, 1, n, stride]."""
    cut = split(token_blocks(x, block), 3, stride)
    if real is None and x.shape[2] % block == 0:  # the common case reads x once, in its own dtype
        return cut.mean(3, dtype=torch.float32), torch.ones(1, 1, cut.shape[2], stride, device=x.device)
    if real is None:
        real = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    weight = split(blocks_of(real, block).float(), 2, stride)
    found = weight.sum(2)  # [B, n, stride]
    means = (cut.float() * weight[:, None, ..., None]).sum(3) / found.clamp_min(1)[:, None, ..., None]
    return means, (found > 0).float()[:, None]


def value_bonus(v: Tensor, ctx: Context, stride: int) -> Tensor:
    """How far the values of each key block stand out, float32 [B, Hkv, nK]: the mean of max(z, 0) over its groups."""
    real = real_keys(ctx, v.device)
    if real is None:
        real = torch.ones(1, ctx.keys, dtype=torch.bool, device=v.device)
    norms = v.float().norm(dim=-1).masked_fill(~real[:, None], 0.0)
    groups, found = blocks_of(norms, stride).amax(-1), blocks_of(real, stride).any(-1)[:, None]
    size = (groups + 1e-6).log()
    count = found.sum(-1, keepdim=True).clamp_min(1)
    mean = (size * found).sum(-1, keepdim=True) / count
    spread = (((size - mean) * found).square().sum(-1, keepdim=True) / count).sqrt().clamp_min(1e-6)
    above = ((size - mean) / spread).clamp_min(0) * found
    found = found.expand(above.shape[0], 1, -1)
    return block_means(above[..., None], ctx.block // stride, found[:, 0])[..., 0]


def base_count(blocks: int, keep_ratio: float | None) -> int:
    """k0, the blocks that the first sparse row keeps, of a prompt of `blocks` blocks."""
    if keep_ratio is not None:
        return min(max(round(keep_ratio * blocks), 1), blocks)
    if blocks < 56:
        return blocks
    return min(int(0.2 * blocks + 30) if blocks < 160 else int(0.1 * blocks) + 30, blocks)


@lru_cache(maxsize=256)
def position_decay(blocks: int, keep_ratio: float | None, alpha: float) -> tuple[int, ...]:
    """How many blocks each row of a prompt of `blocks` blocks keeps."""
    first = base_count(blocks, keep_ratio)
    counts = decayed(first, alpha, blocks).add(1e-9).floor().clamp_min(1)
    return tuple(min(int(count), row + 1) for row, count in enumerate(counts.tolist()))


def _counts(ctx: Context, keep_ratio: float | None, alpha: float, device: torch.device) -> tuple[Tensor, int]:
    """The counts of this call's rows, int64 [B or 1, 1, nQ, 1]; each batch row has the blocks of its own prompt."""
    rows, first, table = -(-ctx.queries // ctx.block), ctx.q_offset // ctx.block, []
    for begin, end in prompt_spans(ctx):
        sink = begin // ctx.block
        counts = position_decay(max(-(-end // ctx.block) - sink, 1), keep_ratio, alpha)
        table.append([counts[min(max(first + row - sink, 0), len(counts) - 1)] for row in range(rows)])
    widest = min(max(max(line) for line in table), -(-ctx.keys // ctx.block))
    return torch.tensor(table, device=device).view(len(table), 1, rows, 1), widest


SELECTOR = Stem
