"""Better four-bit weights under the same Hessian: scales chosen for what rounding can make up for, then descent.

GPTQ (`compensate`) takes the scales as they come and rounds each column once. Three steps go further; all of them
lower, or never raise, the loss of the layer's output ``Tr((W - Q) H (W - Q)^T)``, and none changes the format.

* **Scales before rounding.** An error of column j that cannot be made up for costs ``1 / U[j, j]^2`` (`importance`),
  less than ``H[j, j]`` where later columns can compensate. Each tile's range is shrunk to what loses least by this
  measure. Integer codes reach from -8 to 7, so one end of a symmetric grid is longer: a *signed* scale, negative where
  the largest weight is positive, turns the long end to it. Engines multiply by the scale and do not ask for its sign;
  GGUF's Q4_0 and AutoRound's checkpoints have such scales.
* **Scales after rounding.** With the codes c of a tile fixed, the best scale is a least squares problem in one number:
  ``s + (R c) / (c H c)`` with ``R = (W - Q) H``.
* **Codes after rounding.** Coordinate descent (Behdin et al. 2023, QuantEase, arXiv 2309.01885): column by column, the
  best code given all others, ``Q[:, j] + R[:, j] / H[j, j]`` rounded. Scales and codes take turns.

A weight may also aim at what the layer gave in the original model (`aimed`; Arai and Ichikawa 2025, arXiv 2504.09629):
for inputs X of the compressed model and X~ of the original, ``W + share W D (H + damping)^-1`` with
``D = (X~ - X)^T X / tokens`` is what gives the original's outputs from the compressed model's inputs, by least squares.

Shapes: weights ``[out, in]``, H ``[in, in]``. Everything is float32; scales are rounded to the type in which they are
stored before their loss is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .clip import bands, clip_range, in_rows
from .compensate import INNER, LAZY, Factor, Hessian, round_in_place
from .quantize import SCALE_TYPES, STORAGE, TINY, Quantized, spread, tile_of, tile_range
from .scheme import Quant

SHRINK = 0.7  # the smallest range that is tried, as a share of the full one
STEPS = 13
FEWER = 7  # enough where nothing refines what was found: the divergence is the same, the search takes half as long
PASSES = 3  # of descent


def importance(factor: Factor) -> Tensor:
    """Return ``[in]`` what an error of each column costs after the best compensation by those rounded later."""
    cost = torch.empty_like(factor.upper.diagonal())
    cost[factor.order] = factor.upper.diagonal().square().reciprocal()
    return cost


def aimed(weight: Tensor, hessian: Hessian, factor: Factor, share: float) -> Tensor:
    """Return the float32 weight whose outputs on the compressed model's inputs come nearer to the original's."""
    if hessian.drift is None or share == 0:
        return weight.float()
    order, upper = factor.order, factor.upper
    pulled = (weight.float() @ hessian.drift)[:, order] @ upper.T @ upper
    return weight.float() + share * pulled[:, order.argsort()]


# ----------------------------------------------------------------------------------------- before rounding


def searched(
    weight: Tensor,
    quant: Quant,
    cost: Tensor,
    scale_dtype: torch.dtype,
    *,
    signed: bool = False,
    steps: int = STEPS,
    outer: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (scale, zero) of each tile that lose least when column j's squared errors cost ``cost[j]``.

    `steps` ranges are tried, with 1 the full one alone.

    Formats and granularities other than integers in runs of a row are left to `clip.clip_range`, which has no signed
    scales.
    """
    if not in_rows(weight, quant) or quant.format.kind != "int":
        return clip_range(weight, quant, cost, scale_dtype, outer)
    kept = SCALE_TYPES.get(quant.scale, scale_dtype)
    columns = tile_of(quant.granularity, (weight.shape[0], weight.shape[1]))[1]
    low, high = tile_range(weight, quant.granularity)
    scale = torch.empty(low.shape, dtype=kept, device=weight.device)
    zero = None if quant.symmetric else torch.empty(low.shape, dtype=torch.int8, device=weight.device)
    costs = cost.view(1, -1, columns)
    for rows in bands(weight):
        tiles = weight[rows].float().view(-1, low.shape[1], columns)
        best = torch.full(tiles.shape[:2], torch.inf, device=weight.device)
        for tried, offset in _candidates(low[rows], high[rows], quant, scale_dtype, kept, signed, steps):
            lost = _loss(tiles, tried, offset, costs, quant)
            better = lost < best
            best = torch.where(better, lost, best)
            scale[rows] = torch.where(better, tried, scale[rows])
            if zero is not None and offset is not None:
                zero[rows] = torch.where(better, offset, zero[rows])
    return scale, zero


def _candidates(
    low: Tensor,
    high: Tensor,
    quant: Quant,
    dtype: torch.dtype,
    kept: torch.dtype,
    signed: bool,
    steps: int,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (scale, zero) for ranges from the full one to `SHRINK` of it, as they will be stored."""
    grid = quant.format
    for step in range(steps):
        share = 1 - (1 - SHRINK) * step / max(steps - 1, 1)
        if not quant.symmetric:
            scale = _stored((high - low).double() * share / (grid.high - grid.low), dtype, kept)
            zero = (grid.low - low * share / scale.float()).round().clamp(grid.low, grid.high)
            yield scale, zero.to(torch.int8)
            continue
        largest = torch.maximum(-low, high).double() * share
        yield _stored(largest / ((grid.high - grid.low) / 2), dtype, kept), None
        if signed:
            long_end = torch.where(high > -low, -largest, largest) / -grid.low
            yield _stored(long_end, dtype, kept), None


def _stored(scale: Tensor, dtype: torch.dtype, kept: torch.dtype) -> Tensor:
    rounded = scale.to(dtype).to(kept)
    return torch.where(rounded.abs() > TINY, rounded, torch.ones_like(rounded))


def _loss(tiles: Tensor, scale: Tensor, zero: Tensor | None, cost: Tensor, quant: Quant) -> Tensor:
    """Return the weighted squared rounding error of each tile ``[rows, tiles]`` of ``[rows, tiles, columns]``."""
    steps = scale.float()[..., None]
    scaled = tiles / steps
    if zero is not None:
        scaled += zero.float()[..., None]
    codes = scaled.round().clamp_(quant.format.low, quant.format.high)
    return (codes.sub_(scaled).square_().mul_(cost)).sum(-1) * steps[..., 0].square()


# ------------------------------------------------------------------------------------------ after rounding


def descended(
    weight: Tensor, rounded: Quantized, matrix: Tensor, *, damping: float = 0.0, passes: int = PASSES
) -> Quantized:
    """Return codes and scales that lose at most what `rounded` loses under ``H + damping mean(diag H) I``.

    Scales move only where every tile has a free one; codes always. Each pass is one product ``H x [in, out]``.
    """
    quant, shape = rounded.quant, (weight.shape[0], weight.shape[1])
    tile = tile_of(quant.granularity, shape)
    free = in_rows(weight, quant) and rounded.global_scale is None
    state = _Descent(weight, rounded, matrix, damping)
    for _ in range(passes):
        width = tile[1] if tile[1] < shape[1] else LAZY
        if free and tile[1] >= shape[1]:
            state.rescale(0, shape[1], 0)
        for start in range(0, shape[1], width):
            stop = min(start + width, shape[1])
            before = state.values[start:stop].clone()
            if free and tile[1] < shape[1]:
                state.rescale(start, stop, start // width)
            state.recode(start, stop)
            state.settle(start, stop, before)
    return state.result(rounded)


class _Descent:
    """The state of the descent, transposed ``[in, out]`` so that a column of the weight is contiguous.

    ``residual = (H + damping) (W - Q)^T``. While a strip of columns is worked on only its own rows are current;
    `settle` brings the others up to date.
    """

    def __init__(self, weight: Tensor, rounded: Quantized, matrix: Tensor, damping: float) -> None:
        self.quant, shape = rounded.quant, (weight.shape[0], weight.shape[1])
        tile = tile_of(rounded.quant.granularity, shape)
        self.matrix = matrix.clone()
        diagonal = self.matrix.diagonal()
        mean = diagonal.mean().clamp(min=TINY)
        diagonal[diagonal == 0] = mean  # dead inputs: the nearest code is as good as any
        diagonal.add_(damping * mean)
        self.cost = diagonal.tolist()
        self.codes = rounded.codes.float().T.contiguous()
        self.scale = rounded.scale.clone()
        self.steps = spread(rounded.scale.float(), tile, shape).T.contiguous()
        self.zero = None if rounded.zero is None else spread(rounded.zero.float(), tile, shape).T.contiguous()
        self.values = self._values(slice(None))
        self.residual = self.matrix @ (weight.float().T - self.values)

    def _offsets(self, rows: slice) -> Tensor:
        return self.codes[rows] if self.zero is None else self.codes[rows] - self.zero[rows]

    def _values(self, rows: slice) -> Tensor:
        return self._offsets(rows) * self.steps[rows]

    def rescale(self, start: int, stop: int, tile: int) -> None:
        """Move the scales of one column of tiles to the best stored ones for their codes, where that gains."""
        rows = slice(start, stop)
        codes, residual = self._offsets(rows), self.residual[rows]
        within = self.matrix[rows, rows]
        spread_codes = within @ codes
        slope, curve = (residual * codes).sum(0), (spread_codes * codes).sum(0)
        now = self.scale[:, tile].float()
        wanted = (now + slope / curve).to(self.scale.dtype)
        change = wanted.float() - now
        gain = change * (2 * slope - change * curve)
        ratio = wanted.float() / now
        better = (gain > 0) & (ratio > 0.5) & (ratio < 2)
        change = torch.where(better, change, 0.0)
        moved = torch.where(better, wanted.float(), now)
        self.scale[:, tile] = moved.to(self.scale.dtype)
        self.steps[rows] = moved
        self.values[rows] += codes * change
        residual -= spread_codes * change

    def recode(self, start: int, stop: int) -> None:
        """Give each column of a strip, one after the other, its best codes; the strip's residual stays current."""
        for first in range(start, stop, INNER):
            last = min(first + INNER, stop)
            moved = torch.empty_like(self.values[first:last])
            for row in range(first, last):
                value, step, code = self.values[row], self.steps[row], self.codes[row]
                wanted = torch.add(value, self.residual[row], alpha=1 / self.cost[row]).div_(step)
                if self.zero is not None:
                    wanted += self.zero[row]
                code.copy_(round_in_place(wanted, self.quant.format))
                found = (code if self.zero is None else code - self.zero[row]) * step
                change = torch.sub(found, value, out=moved[row - first])
                value.copy_(found)
                self.residual[row:last].addr_(self.matrix[row:last, row], change, alpha=-1)
                self.residual[first:row].addr_(self.matrix[first:row, row], change, alpha=-1)
            for other in (slice(start, first), slice(last, stop)):
                self.residual[other].addmm_(self.matrix[other, first:last], moved, alpha=-1)

    def settle(self, start: int, stop: int, before: Tensor) -> None:
        """Bring the residual of all other columns up to date with what changed in a strip."""
        moved = self.values[start:stop] - before
        for other in (slice(0, start), slice(stop, len(self.values))):
            self.residual[other].addmm_(self.matrix[other, start:stop], moved, alpha=-1)

    def result(self, rounded: Quantized) -> Quantized:
        """Return the weight as it stands now."""
        codes = self.codes.to(STORAGE[self.quant.format.kind]).view(torch.uint8).T.contiguous()
        return replace(
            rounded,
            codes=codes.view(STORAGE[self.quant.format.kind]),
            scale=self.scale.view_as(rounded.scale),
        )
