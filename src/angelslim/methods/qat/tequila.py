"""Tequila (arXiv 2509.23809): ternary weights whose dead zone speaks through a bias, so that it is not trapped.

A weight between the thresholds has no effect on the output and moves by noise. Tequila adds lambda times the sum of each
row's dead weights to the output, ``y = x A^T + lambda sum_{i in D} w_i``, with A and D those of absmean, so that they
get a second gradient: dL/dw is ``x^T g`` for all weights as usual, and ``lambda sum g`` more in the dead zone, where the
sum goes over tokens.

The term does not depend on the input: it is one number for each output, computed here by a row sum and added as the
bias of the same matrix product. When training is over it becomes an ordinary bias. lambda = 0 is absmean.

`variant: reactivation` is the older form: a dead weight adds ``lambda sign(w) sign(x)``. That depends on the input,
needs a second matrix product and has no offline form, so here it is an aid of training like Sherry's: lambda falls
linearly to zero over the run, which the publication does not do, only training mode has it, and what is merged is
plain absmean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...numerics.lowbit.record import LowBit
from ...numerics.lowbit.ternary import absmean, dead_zone
from ...numerics.scheme import per_group
from ._anneal import strength
from ._fixed import TernaryByRule
from ._options import choice, number
from ._quantizer import COMMON


def dead_sums(tiles: Tensor, *, rows: int, factor: float) -> tuple[Tensor, Tensor]:
    """Return ``factor`` times the sum of each row's dead weights ``[rows]``, and the threshold ``[down, across, 1]``."""
    threshold = absmean(tiles)[0]
    return (tiles * dead_zone(tiles, threshold)).view(rows, -1).sum(1).mul_(factor), threshold


def dead_slopes(tiles: Tensor, threshold: Tensor, grad: Tensor, *, factor: float) -> Tensor:
    """Return the gradient of `dead_sums` to the tiles, from that of the sums ``[rows]``."""
    dead = dead_zone(tiles, threshold).view(len(grad), -1)
    return (dead * (grad * factor)[:, None]).view(tiles.shape)


class DeadSum(torch.autograd.Function):
    """``factor * sum of a row's dead weights``: ``[out]`` in float32, from tiles ``[down, across, size]``."""

    @staticmethod
    def forward(ctx: Any, tiles: Tensor, rows: int, factor: float, run: Any) -> Tensor:
        """Sum over the dead weights of each row."""
        total, threshold = run(dead_sums, tiles, rows=rows, factor=factor)
        ctx.save_for_backward(tiles, threshold)
        ctx.factor, ctx.run = factor, run
        return cast(Tensor, total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Each dead weight gets the factor times its row's gradient; which are dead is computed again."""
        return ctx.run(dead_slopes, *ctx.saved_tensors, grads[0], factor=ctx.factor), None, None, None


class DeadSigns(torch.autograd.Function):
    """``factor * sign(w)`` in the dead zone and 0 elsewhere; sign counts as the identity backward."""

    @staticmethod
    def forward(ctx: Any, tiles: Tensor, threshold: Tensor, factor: Tensor) -> Tensor:
        """Return signs of the size `factor` ``[]``."""
        ctx.save_for_backward(tiles, threshold, factor)
        return tiles.sign().mul_(dead_zone(tiles, threshold)).mul_(factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Hand the gradient to the dead weights."""
        tiles, threshold, factor = ctx.saved_tensors
        return grads[0] * factor * dead_zone(tiles, threshold), None, None


class DeadZoneBias(nn.Module):
    """The parametrization of the layer's bias that adds the row sums; its own bias stays what it is."""

    def __init__(self, linear: nn.Linear, quantizer: Tequila) -> None:
        super().__init__()
        self.owner = (linear, quantizer)  # a tuple, since a module of the layer cannot hold the layer

    def forward(self, bias: Tensor) -> Tensor:
        """Return the bias that the layer adds, ``[out]``."""
        linear, quantizer = self.owner
        if not quantizer.enabled:
            return bias
        return bias + quantizer.dead_sum(_master(linear)).to(bias.dtype)


class Tequila(TernaryByRule):
    """Options: `lambda` (0.001), `variant` (bias or reactivation), and those of every quantizer; groups of 128."""

    reads = COMMON | {"lambda", "variant"}
    factor: Tensor

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options, per_group(128))
        self.peak = number(options, "lambda", 1e-3, 0.0, 1.0)
        self.merges = choice(options, "variant", "bias", ("bias", "reactivation")) == "bias"
        self.handle: torch.utils.hooks.RemovableHandle | None = None
        # A buffer: a number would make a compiled model compile again at each step.
        self.register_buffer("factor", torch.tensor(self.peak), persistent=not self.merges)

    rule = "absmean"

    def dead_sum(self, weight: Tensor) -> Tensor:
        """Return lambda times the sums of the rows' dead weights, float32 ``[out]``, differentiable."""
        found = DeadSum.apply(self.tiles(weight), len(weight), self.peak, self.run)  # type: ignore[no-untyped-call]
        return cast(Tensor, found)

    def merged(self, weight: Tensor) -> LowBit:
        """Return codes and scales, and the bias where there is one."""
        record = super().merged(weight)
        if not self.merges:
            return record
        with torch.no_grad():
            return replace(record, bias=self.dead_sum(weight))

    def progress(self, step: int, steps: int) -> None:
        """Let the older form fade."""
        super().progress(step, steps)
        if not self.merges:
            self.factor.fill_(strength(step, steps, "linear", 0.0, self.peak))

    def join(self, linear: nn.Linear) -> None:
        """Add the row sums to the layer's bias, which may be missing, or the signs' product to its output."""
        if not self.merges:
            self.handle = linear.register_forward_hook(self._react)
            return
        if linear.bias is None:
            del linear.bias
            weight = _master(linear)
            linear.register_buffer("bias", torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
        parametrize.register_parametrization(linear, "bias", DeadZoneBias(linear, self), unsafe=True)

    def leave(self, linear: nn.Linear) -> None:
        """Give the layer back the bias that it had."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            return
        parametrize.remove_parametrizations(linear, "bias", leave_parametrized=False)
        if "bias" in linear._buffers:
            del linear.bias
            linear.register_parameter("bias", None)

    def _react(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add what the dead weights' signs make of the inputs' signs."""
        if not (self.enabled and self.training):
            return output
        weight = _master(linear)
        tiles = self.tiles(weight)
        with torch.no_grad():
            threshold = absmean(tiles)[0]
        signs = DeadSigns.apply(tiles, threshold, self.factor)  # type: ignore[no-untyped-call]
        return output + F.linear(inputs[0].sign(), signs.view(weight.shape).to(weight.dtype)).to(output.dtype)


def _master(linear: nn.Module) -> Tensor:
    """Return the layer's master weight, which is looked up each time: sharding exchanges parameters."""
    parametrizations = cast(nn.ModuleDict, linear.parametrizations)
    return cast(Tensor, parametrizations["weight"].original)


QUANTIZER = Tequila
