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
from ...numerics.lowbit.ternary import absmean, dead_zone, ternary_codes
from ...numerics.lowbit.tiles import kept, tiled
from ...numerics.scheme import Granularity, per_group
from ._anneal import strength
from ._fixed import TernaryByRule
from ._formula import Formula
from ._options import choice, number
from ._quantizer import COMMON, product_type


def values_and_sums(
    weight: Tensor,
    *,
    grain: Granularity,
    storage: torch.dtype | None,
    dtype: torch.dtype,
    factor: float,
    sums: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return ternary values ``[out, in]`` in `dtype`, and `factor` times the sum of each row's dead weights in `sums`."""
    tiles = tiled(weight, grain).float()
    threshold, scale = absmean(tiles)
    values = ternary_codes(tiles, threshold).mul_(kept(scale, storage)).to(dtype).view(weight.shape)
    dead = (tiles * dead_zone(tiles, threshold)).view(weight.shape).sum(1)
    return values, dead.mul_(factor).to(sums)


def dead_slopes(
    values: Tensor,
    grad: Tensor | None,
    to_sums: Tensor | None,
    *,
    factor: float,
    dtype: torch.dtype,
    asked: object,
) -> tuple[Tensor | None]:
    """Return the gradient to the weight: that of its `values`, and through the sums ``[out]`` where these are zero."""
    wide = torch.zeros_like(values, dtype=dtype) if grad is None else grad.to(dtype)
    if to_sums is None:
        return (wide,)
    return (torch.where(values == 0, wide + (to_sums.to(dtype) * factor)[:, None], wide),)


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


class Waiting:
    """Sums that were computed with a weight and wait for the layer to ask for them; no copy of a layer has them."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.of: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: object) -> Waiting:
        return Waiting()

    def put(self, weight: Tensor, sums: Tensor) -> None:
        """Keep the sums of `weight` as it is now."""
        self.sums, self.of = sums, (weight.data_ptr(), weight._version, torch.is_grad_enabled())

    def take(self, weight: Tensor) -> Tensor | None:
        """Return the sums, once, where they are those of `weight` as it is now."""
        sums, self.sums = self.sums, None
        return sums if self.of == (weight.data_ptr(), weight._version, torch.is_grad_enabled()) else None


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
        sums = quantizer.dead_sum(_master(linear))
        return sums if quantizer.alone else bias + sums.to(bias.dtype)


class Tequila(TernaryByRule):
    """Options: `lambda` (0.001), `variant` (bias or reactivation), and those of every quantizer; groups of 128."""

    reads = COMMON | {"lambda", "variant"}
    factor: Tensor

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options, per_group(128))
        self.peak = number(options, "lambda", 1e-3, 0.0, 1.0)
        self.merges = choice(options, "variant", "bias", ("bias", "reactivation")) == "bias"
        self.handle: torch.utils.hooks.RemovableHandle | None = None
        self.alone = False  # whether the layer has no bias of its own
        self.waiting = Waiting()
        # A buffer: a number would make a compiled model compile again at each step.
        self.register_buffer("factor", torch.tensor(self.peak), persistent=not self.merges)

    rule = "absmean"

    def quantized(self, weight: Tensor) -> Tensor:
        """Return ``scale * t``; the row sums, which the layer asks for next, are kept until then."""
        if not self.merges:
            return super().quantized(weight)
        values, sums = self._both(weight)
        if not torch.compiler.is_compiling():  # a compiler sees by itself what is computed twice
            self.waiting.put(weight, sums)
        return values

    def dead_sum(self, weight: Tensor) -> Tensor:
        """Return lambda times the sums of the rows' dead weights, ``[out]``, differentiable.

        A linear layer reads its weight and then its bias: the sums were computed with the weight.
        """
        sums = None if torch.compiler.is_compiling() else self.waiting.take(weight)
        return self._both(weight)[1] if sums is None else sums

    def _both(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        kind = product_type(weight)
        settings: dict[str, Any] = {"grain": self.granularity, "storage": self.scale_type, "dtype": kind}
        settings |= {"factor": self.peak, "sums": kind if self.alone else torch.float32}
        back = {"factor": self.peak, "dtype": weight.dtype}
        formula = Formula(values_and_sums, settings, dead_slopes, back, keeps=(1,))
        return cast(tuple[Tensor, Tensor], self.compute(formula, weight))

    def merged(self, weight: Tensor) -> LowBit:
        """Return codes and scales, and the bias where there is one."""
        record = super().merged(weight)
        if not self.merges:
            return record
        with torch.no_grad():
            settings: dict[str, Any] = {"grain": self.granularity, "storage": self.scale_type}
            settings |= {"dtype": weight.dtype, "factor": self.peak, "sums": torch.float32}
            return replace(record, bias=values_and_sums(weight, **settings)[1])

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
            self.alone = True
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
