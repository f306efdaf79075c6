"""Uniform top-k: the same number of blocks for every row, by the product of mean query and mean key.

The plain baseline that other methods must beat. It has no budget but a density, 0.2 unless given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._budget import keep_density
from .._options import Settings
from .._scores import pooled_scores
from ..plan import BlockPlan, Context, finish

DEFAULT = 0.2


class Uniform:
    """Option: `density`."""

    reads = frozenset({"density"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.settings = Settings("uniform", options, {})

    def select(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> BlockPlan:
        """Keep each row's best blocks."""
        density = self.settings.density(ctx, q.shape[1])
        return finish(keep_density(pooled_scores(q, k, ctx), ctx, density or (DEFAULT,)), ctx)


SELECTOR = Uniform
