"""Sherry (arXiv 2601.07892): 3:4 sparse ternary weights in 1.25 bits, trained with a fading full-precision addition.

Of four neighbouring inputs the weight with the smallest magnitude becomes zero and the others their signs, times the
mean magnitude of the kept weights of a group (`numerics.lowbit.sparse34`). The gradient goes straight through to all four.

Arenas, its aid of training, adds the full-precision weight: ``y = x Q(W)^T + e x W^T`` with e falling to 0. That is one
product with ``Q(W) + e W``. dL/dW becomes ``(1 + e) x^T g``; what matters is dL/dx, which ``Q(W)`` alone keeps within
few directions. e rises over the first `warmup` share of the optimizer steps to `max_eps` and falls as `anneal` says;
the report says no more than that it reaches zero, the shapes and the 10 percent are those of the published code.

Where e reaches zero is `ends`, a share of the steps: 1 is the published end, the last step, and leaves none to adapt to a
model without the addition. `phase_in`, which every quantizer has, is the other way in (`_phase`); the two exclude each
other.

e acts in training mode only, so that evaluations see the model that will be exported, and it has no part in what is
merged: a run that stops early still yields weights that can be encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ...base.errors import ConfigError
from ...numerics.lowbit.record import LowBit
from ...numerics.lowbit.sparse34 import require_fours, signs34
from ...numerics.lowbit.tiles import by_row, kept, tiled
from ...numerics.scheme import Granularity, per_group
from ._anneal import KINDS, strength
from ._formula import Formula
from ._options import choice, number
from ._quantizer import COMMON, Quantizer, product_type


def sparse_values(
    weight: Tensor,
    share: Tensor | None,
    *,
    granularity: Granularity,
    storage: torch.dtype | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``scale * t`` of a weight ``[out, in]`` in `dtype`, and `share` times the weight more where there is one."""
    codes, scale = signs34(tiled(weight, granularity).float())
    values = codes.mul_(kept(scale, storage)).view(weight.shape)
    return (values if share is None else torch.addcmul(values, weight, share)).to(dtype)


def residual_slopes(
    share: Tensor, grad: Tensor, *, dtype: torch.dtype, asked: object
) -> tuple[Tensor | None, None]:
    """Return the gradient of ``values + e * weight`` to the weight: ``(1 + e) g``."""
    grad = grad.to(dtype)
    return torch.addcmul(grad, grad, share.to(dtype)), None


class Sherry(Quantizer):
    """Options: `anneal` (cosine, linear, exponential, none), `warmup` (0.1), `ends` (1), `max_eps` (1); groups of 128."""

    reads = COMMON | {"anneal", "warmup", "ends", "max_eps"}
    share: Tensor

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options, per_group(128))
        self.anneal = choice(options, "anneal", "none" if self.phase_in else "cosine", KINDS)
        self.warmup = number(options, "warmup", 0.1, 0.0, 1.0)
        self.ends = number(options, "ends", 1.0, 0.0, 1.0)
        self.peak = number(options, "max_eps", 1.0, 0.0, 10.0)
        if self.ends < self.warmup:
            raise ConfigError(
                f"ends is {self.ends:g}, before the end of the warmup at {self.warmup:g}.",
                fix="Raise ends or lower warmup.",
            )
        if self.phase_in and self.anneal != "none":
            raise ConfigError(
                f"phase_in is set beside anneal: {self.anneal}: two ways to keep a part of the full-precision weight.",
                fix="Set anneal: none, or leave out phase_in.",
            )
        # A buffer: a number would make a compiled model compile again at each step.
        self.register_buffer("share", torch.zeros(()))

    def start(self, weight: Tensor) -> None:
        """Refuse what does not come in fours."""
        require_fours(weight.shape[1])
        super().start(weight)
        require_fours(self.group(weight))

    def quantized(self, weight: Tensor) -> Tensor:
        """Return ``scale * t``, and e times the weight more while training."""
        settings: dict[str, Any] = {"granularity": self.granularity, "storage": self.scale_type}
        settings["dtype"] = product_type(weight)
        if not self.training or self.anneal == "none":
            return cast(Tensor, self.compute(Formula(sparse_values, settings), weight, None))
        formula = Formula(sparse_values, settings, residual_slopes, {"dtype": weight.dtype}, keeps=(1,))
        return cast(Tensor, self.compute(formula, weight, self.share))

    def merged(self, weight: Tensor) -> LowBit:
        """Return codes and scales; exactly one of four neighbours is zero."""
        with torch.no_grad():
            codes, scale = signs34(self.tiles(weight))
            codes = codes.to(torch.int8).view(weight.shape)
            return LowBit(
                codes, by_row(kept(scale, self.scale_type), len(codes)), "ternary", self.group(weight)
            )

    def progress(self, step: int, steps: int) -> None:
        """Set e."""
        super().progress(step, steps)
        self.share.fill_(strength(step, steps, self.anneal, self.warmup, self.peak, self.ends))


QUANTIZER = Sherry
