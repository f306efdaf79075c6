"""What a quantizer is: a parametrization of the weight of an ordinary linear layer.

The layer keeps its float32 master weight W ``[out, in]``; each time it computes, it computes with Q(W) instead, and the
gradient of Q(W) is carried over to W. Nothing else of the model changes, so any model can be trained and the result is
an ordinary model again.

One object is made from a recipe's options, which checks them; `base.attach` copies it for every layer and calls
`start` with the layer's weight. What is computed is computed in float32 and handed over in the type of the matrix
product, which under autocast is the only tensor of the weight's size that stays until the backward pass.

Rounding may be phased in (`_phase`), and its chains of operations may be compiled (`_fused`), those of several layers
at a time (`_ahead`): options of every quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...numerics.lowbit.record import LowBit
from ...numerics.lowbit.tiles import shape_of, tiled
from ...numerics.quantize import Quantized
from ...numerics.scheme import PER_CHANNEL, Granularity
from . import _ahead, _fused
from ._formula import Formula, Single
from ._options import choice, grain, number, storage
from ._phase import left_over, phased

COMMON = frozenset({"granularity", "group_size", "scale_dtype", "phase_in", "compile"})


class Quantizer(nn.Module):
    """Options of every quantizer: `granularity` (tensor, channel, group), `group_size` (128), `scale_dtype` (float16),

    `phase_in` (0: the share of the steps over which rounding sets in) and `compile` (auto, true, false). Scales are rounded to `scale_dtype` while training, so that the file holds the very weights that were trained.
    """

    reads: ClassVar[frozenset[str]] = COMMON  # the options it knows
    learned: tuple[str, ...] = ()  # its float32 parameters that are scales
    granularity: Granularity
    scale_type: torch.dtype | None
    unrounded: Tensor  # the share of the rounding that has not set in yet

    def __init__(self, options: Mapping[str, Any], default: Granularity = PER_CHANNEL) -> None:
        super().__init__()
        self.enabled = True
        self.granularity = grain(options, default)
        self.scale_type = storage(options)
        self.phase_in = number(options, "phase_in", 0.0, 0.0, 1.0)
        self.compiling = choice(
            {"compile": str(options.get("compile", "auto")).lower()}, "compile", "auto", _fused.CHOICES
        )
        self.calls = _ahead.Calls()
        self.phasing = False
        if self.phase_in:
            # A buffer: a number would make a compiled model compile again at each step.
            self.register_buffer("unrounded", torch.zeros(()))

    def start(self, weight: Tensor) -> None:
        """Take the initial values from the layer's weight ``[out, in]``; refuse one that it cannot hold."""
        shape_of((weight.shape[0], weight.shape[1]), self.granularity)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer computes with, ``[out, in]`` in the type of the matrix product."""
        if not self.enabled:
            return weight
        values = self.quantized(weight)
        return phased(values, weight, self.unrounded) if self.phasing and self.training else values

    def quantized(self, weight: Tensor) -> Tensor:
        """Return Q(W), differentiable."""
        raise NotImplementedError

    def merged(self, weight: Tensor) -> LowBit | Quantized:
        """Return the exact weight that remains when training is over."""
        raise NotImplementedError

    def progress(self, step: int, steps: int) -> None:
        """Take note that `step` of `steps` optimizer steps are done."""
        if self.phase_in:
            left = left_over(step, steps, self.phase_in)
            self.unrounded.fill_(left)
            self.phasing = left > 0

    def compute(self, formula: Formula, weight: Tensor, *others: Tensor | None) -> Any:
        """Return the values of a formula of the weight and other parameters and buffers, differentiable.

        As one kernel where that is asked for, and then it may have been computed before the step.
        """
        if self.training and _fused.wanted(self.compiling, weight):
            return _ahead.take(self.calls, formula, weight, *others)
        return Single.apply(formula, False, weight, *others)  # type: ignore[no-untyped-call]

    def join(self, linear: nn.Linear) -> None:
        """Change more of the layer than its weight, after `start`."""

    def leave(self, linear: nn.Linear) -> None:
        """Undo `join`."""

    def tiles(self, weight: Tensor) -> Tensor:
        """View the weight as ``[down, across, size]``; float32, which a master weight is already."""
        return tiled(weight, self.granularity).float()

    def group(self, weight: Tensor) -> int:
        """Return how many inputs of a row share a scale."""
        shape = (weight.shape[0], weight.shape[1])
        return min(shape_of(shape, self.granularity)[2], shape[1])


def product_type(weight: Tensor) -> torch.dtype:
    """Return the type in which the layer multiplies: that of autocast, or the weight's own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
