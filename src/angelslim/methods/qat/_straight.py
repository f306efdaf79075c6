"""The straight-through estimator (arXiv 1308.3432): values forward, the identity backward."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """The given values forward, the identity backward; nothing is kept in between."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, values: Tensor) -> Tensor:
        """Return `values` as they are; ``source + (values - source)`` would not be exact."""
        ctx.dtype = source.dtype
        return values.detach()  # an alias, on which autograd may write its history

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient to the source."""
        return grads[0].to(ctx.dtype), None


def straight_through(source: Tensor, values: Tensor) -> Tensor:
    """Return `values`, in a type of their own, with the gradient of `source`."""
    return cast(Tensor, StraightThrough.apply(source, values))  # type: ignore[no-untyped-call]
