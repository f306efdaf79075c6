"""Rounding that sets in step by step instead of all at once.

A trained model that is rounded to a few levels in one moment loses most of what it knows, and the first part of the
training is spent on finding it again. Here the layer computes with

    Q(W) + e (W - Q(W)),

where e falls linearly from 1 to 0 over the first `phase_in` share of the optimizer steps and stays there. The first step
sees the model as it was; the rest of the steps train the model that will be exported, which needs them. Sherry's Arenas
(`sherry`) adds ``e W`` instead: with e = 1 that is about ``2 W``, a model that was never trained, and its e reaches zero
at the last step, when nothing is left to adapt to that.

In the study of ``docs/training.md`` it did not help: with one seed, TWN lost 0.015 nats a token more with it and Sherry about
as much as without. It is off unless asked for.

The gradient is that of the formula: W gets e g directly and (1 - e) g through Q, a learned scale (1 - e) of its own. For
a straight-through quantizer that sums up to g at any e. Weights that Q clips get e g, so they can come back.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def left_over(step: int, steps: int, share: float) -> float:
    """Return e for the step after `step` finished ones.

    >>> [left_over(step, 8, 0.5) for step in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    assert steps > 0 and step >= 0 and 0 < share <= 1
    return max(1.0 - step / (steps * share), 0.0)


class Phased(torch.autograd.Function):
    """``values + e (weight - values)``; of a size of the weight nothing is kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, left: Tensor) -> Tensor:
        """Return the mixture in the type of `values`; e is a tensor ``[]``."""
        ctx.save_for_backward(left)
        ctx.dtypes = values.dtype, weight.dtype
        return torch.lerp(values.to(weight.dtype), weight, left.to(weight.dtype)).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Hand (1 - e) g to the values and e g to the weight."""
        (left,) = ctx.saved_tensors
        grad, (first, second) = grads[0], ctx.dtypes
        return grad.to(first) * (1 - left).to(first), grad.to(second) * left.to(second), None


def phased(values: Tensor, weight: Tensor, left: Tensor) -> Tensor:
    """Return rounded `values` of a `weight`, the share `left` of the rounding error taken back."""
    return cast(Tensor, Phased.apply(values, weight, left))  # type: ignore[no-untyped-call]
