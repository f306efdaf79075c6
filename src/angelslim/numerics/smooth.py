"""SmoothQuant: part of the activations' spread moves into the weights, where rounding costs less.

A few input channels of a large model are many times wider than the others, and one scale for a token then leaves the
others a handful of steps. Dividing channel j of the input by ``s_j = max|X_j|^a / max|W_j|^(1 - a)`` and multiplying
column j of the weights by it changes nothing but the two ranges (Xiao et al. 2022, arXiv 2211.10438): a = 1 flattens
the inputs, a = 0 the weights, and the paper takes 0.5. Maxima are taken over all calibration tokens and over all rows of
all weights that read the input; both are clamped from below, so that a channel that is always zero keeps a finite scale.

`search` tries exponents instead, coarsely and then finely beside the best, and keeps what loses least of the group's
output, with inputs and weights rounded as the scheme will round them. A sample of tokens and of rows tells. No scale at all is among the candidates and wins ties. Arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..base import parallel
from .products import for_comparing
from .quantize import fake_quantize, quantize, scales_from_range
from .scheme import Quant, Scheme

SMALLEST = 1e-5  # of the maxima
ALPHAS = tuple(step / 20 for step in range(21))
COARSE, FINER = 4, (2, 1)  # every fourth is tried, then those beside the best
ROWS = 512  # of a weight whose outputs judge a candidate


def smooth_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return s ``[in]`` for the largest magnitudes of the input channels and of the weights' columns, both ``[in]``.

    >>> smooth_scale(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 1.0]), 0.5)
    tensor([4., 1.])
    """
    return inputs.float().clamp(min=SMALLEST) ** alpha / weights.float().clamp(min=SMALLEST) ** (1 - alpha)


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight ``[out, in]`` that reads the input, and how both will be rounded."""

    weight: Tensor
    scheme: Scheme
    scale_dtype: torch.dtype  # the type in which the weight's scales are stored

    def sampled(self) -> Reader:
        """Return the reader of up to `ROWS` rows, evenly spaced; of all where scales reach over rows."""
        if self.scheme.weight.granularity.kind not in ("group", "channel"):
            return self
        return Reader(self.weight[:: -(-len(self.weight) // ROWS)], self.scheme, self.scale_dtype)


@dataclass(frozen=True, eq=False)
class Choice:
    """A scale ``[in]``, the exponent it comes from (None: no scale), and the share of a token's output that is lost."""

    scale: Tensor
    alpha: float | None
    loss: float


def search(inputs: Tensor, amax: Tensor, weights: Tensor, readers: Sequence[Reader]) -> Choice:
    """Return the scale that loses least of what the readers make of the sampled inputs ``[tokens, in]``.

    `amax` and `weights` are the statistics ``[in]`` of `smooth_scale`; channels that must have one scale already have
    one value.
    """
    stacks = _stacked([reader.sampled() for reader in readers])
    known = for_comparing(inputs.float())
    outputs = [known @ for_comparing(reader.weight.float()).T for reader, _ in stacks]
    exact = [_squares(each, rows).clamp(min=1e-30) for each, (_, rows) in zip(outputs, stacks, strict=True)]

    def judged(alphas: Sequence[float | None]) -> list[Choice]:
        scales = [
            torch.ones_like(amax) if alpha is None else smooth_scale(amax, weights, alpha) for alpha in alphas
        ]
        losses = parallel.spread(
            [partial(_lost, inputs, known, amax, scale, stacks, exact) for scale in scales]
        )
        return [Choice(*each) for each in zip(scales, alphas, losses, strict=True)]

    found = judged([None, *ALPHAS[::COARSE]])
    for distance in FINER:
        tried = {each.alpha: each.loss for each in found[1:]}
        place = ALPHAS.index(min(tried, key=lambda alpha: tried[alpha])) if tried else 0
        near = (ALPHAS[max(place - distance, 0) : place], ALPHAS[place + distance :])
        found += judged([side[0] for side in near if side])
    return min(found, key=lambda each: each.loss)


def _stacked(readers: Sequence[Reader]) -> list[tuple[Reader, list[int]]]:
    """Put readers that are rounded alike on top of each other, where rows do not know of each other."""
    alike: dict[object, list[Reader]] = {}
    for number, reader in enumerate(readers):
        alone = reader.scheme.weight.granularity.kind not in ("group", "channel")
        alike.setdefault(number if alone else (reader.scheme, reader.scale_dtype), []).append(reader)
    return [
        (
            Reader(torch.cat([x.weight for x in some]), some[0].scheme, some[0].scale_dtype),
            [len(x.weight) for x in some],
        )
        for some in alike.values()
    ]


def _squares(outputs: Tensor, rows: Sequence[int]) -> Tensor:
    """Return ``[tokens, readers]`` the sums of squares of each reader's outputs ``[tokens, rows]``."""
    return torch.stack([part.square().sum(1) for part in torch.split(outputs.float(), list(rows), 1)], 1)


def _lost(
    inputs: Tensor,
    known: Tensor,
    amax: Tensor,
    scale: Tensor,
    stacks: Sequence[tuple[Reader, list[int]]],
    exact: Sequence[Tensor],
) -> float:
    """Return the sum over readers of the mean squared output error of a token, as a share of the token's output.

    A share of all tokens' outputs together would be a share of the few loudest ones' (`moments`). With the errors dX of
    the inputs and dW of the weights the outputs' is ``dX (W + dW) + X dW``, so that products are of small numbers: a
    difference of outputs would need more digits than candidates do. `known` are the inputs as such a factor.
    """
    seen: dict[Quant | None, Tensor] = {None: torch.zeros_like(known)}
    total = 0.0
    for (reader, rows), squares in zip(stacks, exact, strict=True):
        quant = reader.scheme.input
        if quant not in seen:
            assert quant is not None
            scaled = inputs.float() / scale
            seen[quant] = for_comparing(rounded_input(scaled, quant, (amax / scale).max()).sub_(scaled))
        weight = reader.weight.float()
        rounded = quantize(weight * scale, reader.scheme.weight, reader.scale_dtype).dequantize()
        error = (seen[quant] @ for_comparing(rounded).T).float()
        error += known @ for_comparing((rounded / scale).sub_(weight)).T
        total += (_squares(error, rows) / squares).mean(0).sum().item()
    return total


def rounded_input(inputs: Tensor, quant: Quant, amax: Tensor) -> Tensor:
    """Round inputs ``[tokens, in]`` as an engine does; a static scale covers `amax`, the largest of all tokens."""
    if quant.dynamic:
        return fake_quantize(inputs, quant)
    high = amax.reshape(1, 1).float()
    return fake_quantize(inputs, quant, scales_from_range(-high, high, quant)[0])
