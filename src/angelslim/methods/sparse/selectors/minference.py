"""MInference: columns and diagonals that the last queries use, or a pooled map (arXiv 2407.02490).

**vertical_and_slash**: the exact attention of the last `last` queries is summed by column and by distance; the `vertical`
heaviest columns and the `slash` heaviest diagonals are read by all rows. The first `first_columns` columns and the nearest
`near` diagonals always count as heaviest. **block_sparse**: mean query times mean key of each pair of blocks, the `blocks`
best a row. **stream_llm**: A-shape of `vertical` first and `slash` near tokens. Which head is what comes from a file of
`patterns` (`_patterns`; `_search` makes one), or is `kind` for all; `ratio` scales the columns and diagonals.

MInference's kernel gathers single columns. Ours reads blocks; `rounding` says how tokens become blocks (`_vertical`):
``cover`` keeps all of the paper's tokens, ``count`` its cost.

At a density a block's score is the larger of its column's and its diagonal's mean mass; a block_sparse head's is pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ....base.errors import ConfigError
from .._budget import keep_count, keep_density, top
from .._layout import allowed_blocks, starts
from .._options import Option, Settings
from .._patterns import KINDS, HeadPattern, Patterns, read_patterns
from .._scores import (
    column_masses,
    diagonal_sums,
    exact_rows,
    pooled_scores,
    softmax_where,
    spread_over_blocks,
)
from .._static import key_places, reaches, spread_heads
from .._vertical import count_columns, count_slashes, cover_columns, cover_slashes
from ..plan import BlockPlan, Context, finish

KNOWN = {
    "patterns": Option(None, str),
    "kind": Option("vertical_and_slash", str, heads=True, choices=KINDS),
    "vertical": Option(1000, int, 0, heads=True),
    "slash": Option(6096, int, 0, heads=True),
    "blocks": Option(100, int, 1, heads=True),
    "ratio": Option(1.0, float, 0.0),
    "last": Option(64, int, 1),
    "first_columns": Option(30, int, 0),
    "near": Option(100, int, 0),
    "rounding": Option("cover", str, choices=("cover", "count")),
}
LEAST_VERTICAL, LEAST_SLASH = 30, 50


class MInference:
    """Options: see the module; `density`."""

    reads = frozenset({"density", *KNOWN})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("minference", options, KNOWN)
        path = self.settings.given.get("patterns")
        self.patterns: Patterns | None = None if path is None else read_patterns(str(path))

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep what each head's pattern keeps."""
        heads = self._heads(ctx, q.shape[1])
        density = self.settings.density(ctx, q.shape[1])
        by_kind: Mapping[str, Callable[..., Tensor]] = {
            "vertical_and_slash": self._vertical_slash,
            "stream_llm": self._stream,
            "block_sparse": self._blocks,
        }
        found: Tensor | None = None
        for kind in KINDS:
            if not any(head.kind == kind for head in heads):
                continue
            one = by_kind[kind](q, k, ctx, heads, density is not None)
            flags = torch.tensor([head.kind == kind for head in heads], device=q.device)[:, None, None]
            found = one if found is None else torch.where(flags, one, found)
        assert found is not None
        if density is not None:
            return finish(keep_density(found, ctx, density), ctx)
        return finish(found, ctx)

    def _heads(self, ctx: Context, heads: int) -> tuple[HeadPattern, ...]:
        """The pattern of each head of the layer; one entry where they agree."""
        if self.patterns is not None:
            have = [len(layer) for layer in self.patterns]
            if len(have) != ctx.layers or have[ctx.layer] != ctx.of_layer(heads):
                raise ConfigError(
                    f"The pattern file has {len(have)} layers, with {have[min(ctx.layer, len(have) - 1)]} heads in "
                    f"layer {ctx.layer}; the model has {ctx.layers} layers and {ctx.of_layer(heads)} heads.",
                    fix="Search the patterns of this model.",
                )
            return ctx.own(self.patterns[ctx.layer])
        lists = [self.settings.each(name, ctx, heads) for name in ("kind", "vertical", "slash", "blocks")]
        width = max(map(len, lists))
        kinds, vertical, slash, blocks = (entries * (width // len(entries)) for entries in lists)
        return tuple(
            HeadPattern(kind, count, 0) if kind == "block_sparse" else HeadPattern(kind, columns, diagonals)
            for kind, columns, diagonals, count in zip(kinds, vertical, slash, blocks, strict=True)
        )

    def _vertical_slash(
        self, q: Tensor, k: Tensor, ctx: Context, heads: tuple[HeadPattern, ...], score: bool
    ) -> Tensor:
        one = self.settings.one
        weights, begin = exact_rows(q, k, ctx, one("last", ctx))
        slash = diagonal_sums(weights, begin, ctx) / weights.shape[2]
        if score:
            columns = column_masses(weights, ctx).mean(2, keepdim=True)
            return torch.maximum(columns, spread_over_blocks(slash, ctx))
        vertical = weights.mean(2)
        place = torch.arange(ctx.keys, device=q.device)
        since = place - starts(ctx, q.device)[:, None]
        first = (since >= 0) & (since < one("first_columns", ctx))
        vertical = vertical.masked_fill(first[:, None], torch.inf)
        slash = slash.masked_fill(place < one("near", ctx), torch.inf)
        scale = one("ratio", ctx)
        columns_ = tuple(max(int(head.first * scale), LEAST_VERTICAL) for head in heads)
        diagonals = tuple(max(int(head.second * scale), LEAST_SLASH) for head in heads)
        if one("rounding", ctx) == "cover":
            return cover_columns(top(vertical, columns_), ctx) | cover_slashes(top(slash, diagonals), ctx)
        columns_, diagonals = (
            tuple(-(-tokens // ctx.block) for tokens in each) for each in (columns_, diagonals)
        )
        return count_columns(vertical, columns_, ctx) | count_slashes(slash, diagonals, ctx)

    def _stream(
        self, q: Tensor, k: Tensor, ctx: Context, heads: tuple[HeadPattern, ...], score: bool
    ) -> Tensor:
        sizes = torch.tensor([[head.first, head.second] for head in heads], device=q.device).clamp_min(1)
        initial, local = sizes[:, 0, None, None], sizes[:, 1, None, None]
        place, reach = key_places(ctx, q.device), reaches(ctx, q.device)
        if score:
            return spread_heads(-torch.minimum(place.clamp_min(0) / initial, reach / local), q)
        return spread_heads((place < initial) | (reach < local), q)

    def _blocks(
        self, q: Tensor, k: Tensor, ctx: Context, heads: tuple[HeadPattern, ...], score: bool
    ) -> Tensor:
        pooled = pooled_scores(q, k, ctx)
        if score:
            return softmax_where(pooled, allowed_blocks(ctx, q.device))
        counts = [min(max(head.first, 1), pooled.shape[-1]) for head in heads]
        count = torch.tensor(counts, device=q.device)[None, :, None, None]
        return keep_count(pooled, ctx, count, max(counts))


SELECTOR = MInference
