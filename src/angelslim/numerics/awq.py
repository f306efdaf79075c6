"""AWQ: channels that matter get finer steps, by a scale that is folded away elsewhere.

A weight ``W [out, in]`` rounded as ``Q(W s) / s`` loses less in the columns where s is large, at the cost of the others:
their tile's step grows with its largest value. Lin et al. 2023 (arXiv 2306.00978) look for s among powers of what
the calibration shows, on a grid of exponents r:

* ``s = x^r`` with x the mean magnitude of each input channel, as in the paper;
* ``s = x^r / w^(1 - r)`` with w the mean of each column's share of its tile's largest weight ("duo scaling", from
  later implementations).

r = 0 of the first kind is no scale at all, so the search never ends above rounding to nearest. Each candidate is
judged by what the linears that share the input lose of their outputs, ``Tr(E H E^T)`` with ``E = W - Q(W s) / s`` and
H ``[in, in]`` the second moments of the input (`moments`): a matrix product where the paper runs the block. A sample
of the rows is enough to tell candidates apart, and the grid is searched coarsely, then finely beside the best.
Sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import parallel
from .products import Quadratic
from .quantize import TINY, quantize, spread, tile_of, tile_range
from .scheme import Quant

GRID = 20  # steps of the exponent
COARSE, FINER = 4, (2, 1)  # every fourth is tried, then those beside the best
ROWS = 256  # of a weight that are rounded to judge a candidate
STACKED = 1024  # rows of several candidates that are multiplied at once
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

    def losses(self, scales: Sequence[Tensor], form: Quadratic) -> list[float]:
        """Return ``Tr(E H E^T)`` for each scale; several are multiplied with H at once."""
        exact, together = self.weight.float(), max(STACKED // len(self.weight), 1)
        found: list[float] = []
        for start in range(0, len(scales), together):
            errors = torch.cat([exact - self.rounded(scale) for scale in scales[start : start + together]])
            found += form(errors).view(-1, len(exact)).sum(1).tolist()
        return found

    def sampled(self) -> Reader:
        """Return the reader of up to `ROWS` rows, evenly spaced; of all where scales reach over rows."""
        if self.quant.granularity.kind not in ("group", "channel"):
            return self
        step = -(-len(self.weight) // ROWS)
        return Reader(self.weight[::step], self.quant, self.scale_dtype)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One scale ``[in]``, where it comes from, and what the readers lose with it."""

    scale: Tensor
    step: int  # of `GRID`: the exponent
    duo: bool
    loss: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether this is no scale at all."""
        return not self.step and not self.duo


def column_share(readers: Sequence[Reader]) -> Tensor:
    """Return the mean over all rows of each column's magnitude as a share of its tile's largest ``[in]``."""
    total, rows = torch.zeros(1), 0
    for reader in readers:
        weight = reader.weight.float().abs()
        shape = (weight.shape[0], weight.shape[1])
        _, high = tile_range(weight, reader.quant.granularity)
        largest = spread(high, tile_of(reader.quant.granularity, shape), shape)
        total = total.to(weight.device) + (weight / largest.clamp(min=TINY)).sum(0)
        rows += shape[0]
    return total / rows


def scale_of(inputs: Tensor, share: Tensor, step: int, duo: bool) -> Tensor:
    """Return one scale ``[in]`` for mean magnitudes ``[in]`` of the input and shares ``[in]`` of the weights.

    Its extremes lie around 1, which keeps 16-bit weights in range.
    """
    scale = inputs.float().pow(step / GRID)
    if duo:
        scale = scale / (share.float().pow(1 - step / GRID) + SMALLEST)
    scale = scale.clamp(min=SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def search(
    readers: Sequence[Reader], inputs: Tensor, share: Tensor, hessian: Tensor, *, duo: bool = True
) -> list[Candidate]:
    """Return the candidates with their losses, the best first; of equal ones no scale comes first.

    `inputs` and `share` are the statistics ``[in]`` of `scale_of`; channels that must have one scale already have one
    value. Each reader's loss counts as a share of its output, so that a large one does not decide alone.
    """
    readers = [reader.sampled() for reader in readers]
    form = Quadratic(hessian)
    signal = [max(form(reader.weight.float()).sum().item(), 1e-30) for reader in readers]

    def lost(scales: Sequence[Tensor]) -> list[float]:
        losses = [reader.losses(scales, form) for reader in readers]
        return [
            sum(loss / whole for loss, whole in zip(each, signal, strict=True))
            for each in zip(*losses, strict=True)
        ]

    def judged(steps: Sequence[tuple[int, bool]]) -> list[Candidate]:
        scales = [scale_of(inputs, share, step, is_duo) for step, is_duo in steps]
        losses = parallel.spread_all(len(scales), lambda mine: lost([scales[number] for number in mine]))
        return [
            Candidate(scale, *step, loss) for scale, step, loss in zip(scales, steps, losses, strict=True)
        ]

    coarse = [(step, False) for step in range(0, GRID, COARSE)]
    if duo:
        coarse += [(step, True) for step in range(0, GRID + 1, COARSE)]
    found = judged(coarse)
    for distance in FINER:
        best = min(found, key=lambda each: each.loss)
        near = (best.step - distance, best.step + distance)
        found += judged([(step, best.duo) for step in near if 0 <= step <= GRID])
    return sorted(found, key=lambda each: each.loss)
