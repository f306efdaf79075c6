"""AWQ: channels that matter get finer steps, by a scale that is folded away elsewhere.

A weight ``W [out, in]`` rounded as ``Q(W s) / s`` loses less in the columns where s is large, at the cost of the others:
their tile's step grows with its largest value. Lin et al. 2023 (arXiv 2306.00978) look for s among powers of what
the calibration shows, on a grid of exponents r:

* ``s = x^r`` with x the mean magnitude of each input channel, as in the paper;
* ``s = x^r / w^(1 - r)`` with w the mean of each column's share of its tile's largest weight ("duo scaling", from
  later implementations).

r = 0 of the first kind is no scale at all, so the search never ends above rounding to nearest. Each candidate is
judged by what the linears that share the input lose of their outputs, ``Tr(E H E^T)`` with ``E = W - Q(W s) / s`` and
``H = X^T X [in, in]``: exact for linear layers, on all calibration tokens, and two matrix products where the paper
runs the block. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantize import quantize, spread, tile_of, tile_range
from .scheme import Quant

GRID = 20  # steps of the exponent
SMALLEST = 1e-4  # of a scale before it is centred, so that dead channels stay finite


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight ``[out, in]`` that reads the input, and how it will be rounded."""

    weight: Tensor
    quant: Quant
    scale_dtype: torch.dtype  # the type in which its scales are stored

    def rounded(self, scale: Tensor) -> Tensor:
        """Return ``Q(W s) / s`` in float32: what the layer will be worth."""
        scaled = quantize(self.weight.float() * scale, self.quant, self.scale_dtype)
        return scaled.dequantize() / scale

    def loss(self, scale: Tensor, hessian: Tensor) -> float:
        """Return ``Tr(E H E^T)``."""
        error = self.weight.float() - self.rounded(scale)
        return ((error @ hessian) * error).sum().item()


@dataclass(frozen=True, eq=False)
class Candidate:
    """One scale ``[in]``, where it comes from, and what the readers lose with it."""

    scale: Tensor
    ratio: float
    duo: bool
    loss: float = 0.0


def column_share(readers: Sequence[Reader]) -> Tensor:
    """Return the mean over all rows of each column's magnitude as a share of its tile's largest ``[in]``."""
    total, rows = torch.zeros(1), 0
    for reader in readers:
        weight = reader.weight.float().abs()
        shape = (weight.shape[0], weight.shape[1])
        _, high = tile_range(weight, reader.quant.granularity)
        largest = spread(high, tile_of(reader.quant.granularity, shape), shape)
        total = total.to(weight.device) + (weight / (largest + 1e-6)).sum(0)
        rows += shape[0]
    return total / rows


def candidates(inputs: Tensor, share: Tensor, *, duo: bool = True) -> Iterator[Candidate]:
    """Yield the scales to try for mean magnitudes ``[in]`` of the input and the weights; the first is no scale.

    >>> [(each.ratio, each.duo) for each in candidates(torch.ones(2), torch.ones(2))][:3]
    [(0.0, False), (0.05, False), (0.1, False)]
    """
    inputs = inputs.float()
    for step in range(GRID):
        yield Candidate(_centred(inputs.pow(step / GRID)), step / GRID, False)
    if duo:
        for step in range(GRID + 1):
            ratio = step / GRID
            weights = share.float().pow(1 - ratio) + SMALLEST
            yield Candidate(_centred(inputs.pow(ratio) / weights), ratio, True)


def _centred(scale: Tensor) -> Tensor:
    """Put the geometric middle of the extremes at 1, which keeps 16-bit weights in range."""
    scale = scale.clamp(min=SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def search(
    readers: Sequence[Reader], inputs: Tensor, share: Tensor, hessian: Tensor, *, duo: bool = True
) -> list[Candidate]:
    """Return all candidates with their losses, the best first; of equal ones no scale comes first.

    `inputs` and `share` are the statistics ``[in]`` of `candidates`; channels that must have one scale already have
    one value. Each reader's loss counts as a share of its output, so that a large one does not decide alone.
    """
    signal = [max(((r.weight.float() @ hessian) * r.weight.float()).sum().item(), 1e-30) for r in readers]
    found = []
    for each in candidates(inputs, share, duo=duo):
        losses = [reader.loss(each.scale, hessian) for reader in readers]
        loss = sum(lost / whole for lost, whole in zip(losses, signal, strict=True))
        found.append(Candidate(each.scale, each.ratio, each.duo, loss))
    return sorted(found, key=lambda each: each.loss)
