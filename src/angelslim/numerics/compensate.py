"""GPTQ: round a weight column by column and let the columns that are left make up for the error.

A linear layer with weight ``W [out, in]`` and calibration inputs ``X [tokens, in]`` should lose little of its
*output*: minimise ``Tr((W - Q) H (W - Q)^T)`` with the *Hessian* ``H = X^T X / tokens [in, in]``. Let U be upper
triangular with ``U^T U = H^-1``. After column j has been rounded, the best correction of the columns to its right
is ``W[:, j+1:] -= e U[j, j+1:]`` with ``e = (w_j - q_j) / U[j, j]`` (Frantar et al. 2022, arXiv 2210.17323).

* **Static act-order.** Columns with large inputs go first, while many are left to compensate. Scales are those of
  the original tiles and codes are put back in place, so no engine has to know about it.
* **Damping.** A share of the mean diagonal is added to H. If the factorisation fails, 10 and 100 times as much are
  tried, each from the undamped H; if that fails too the caller is told, who has to say so.
* **Dead inputs**, zero in all of the calibration, are rounded to nearest. The paper sets such weights to zero, which
  is harmless only if the input is never anything else.
* **GPTAQ** (Li et al. 2025, arXiv 2504.02692) aims at the outputs that the original model would have had: its
  layer sees ``X~``, the compressed one X. Column j then also leaves ``w_j (X~_j - X_j)`` behind, and the columns to
  its right take ``W[:, j+1:] += alpha w_j P[j, j+1:]`` with ``P = triu(D U^T, 1) U``, ``D = (X~ - X)^T X / tokens``.
  w_j is the column's value just before it is rounded, inside a lazy block and beyond it.

All arithmetic is float32. One `Factor` serves every linear that reads the same input, and all of them are rounded in
one pass (`together`): rows do not know of each other, so the rows of several weights are as good as one weight's, and
the walk over the columns, one short step after another, is paid once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base import parallel
from .products import Quadratic, Squares
from .quantize import STORAGE, Quantized, round_to, spread, tile_of
from .scheme import Format

LAZY = 128  # columns whose effect on the rest is applied as one matrix product
INNER = 32  # the same inside a lazy block: short updates stay in a processor's cache
LEAF = 128  # triangles up to this size are inverted directly
DAMP = 0.05  # the paper's 0.01 trusts a few thousand tokens too far
ALPHA = 0.25  # share of the drift that GPTAQ corrects
RETRIES = (1.0, 10.0, 100.0)
JUDGED = 256  # rows of a weight whose outputs tell how much of all outputs is lost


class Hessian:
    """Sums of ``x^T x``, and of ``(x~ - x)^T x`` where originals x~ are given, over tokens in float32."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.tokens = 0
        self._squares = Squares(width, device)
        self._drift: Tensor | None = None

    def update(self, inputs: Tensor, originals: Tensor | None = None) -> None:
        """Take in inputs ``[tokens, in]``, with those of the original model for the same tokens if known."""
        self.tokens += inputs.shape[0]
        self._squares.add(inputs)
        if originals is not None:
            inputs = inputs.float()
            if self._drift is None:
                self._drift = inputs.new_zeros(inputs.shape[1], inputs.shape[1])
            self._drift.addmm_((originals.float() - inputs).T, inputs)

    def rescale(self, columns: Tensor) -> bool:
        """Divide the inputs by `columns` ``[in]``, seen as they are; the original's are not known then."""
        self._squares.rescale(columns)
        return self._drift is None

    def merge(self) -> None:
        """Add what the other processes of the run have seen."""
        drifts = parallel.total_count(int(self._drift is not None))
        self.tokens = parallel.total_count(self.tokens)
        self._squares.merge()
        if drifts:
            own = torch.zeros_like(self._squares.whole()) if self._drift is None else self._drift
            self._drift = parallel.total(own)

    @property
    def matrix(self) -> Tensor:
        """H, the mean over tokens."""
        return self._squares.whole() / max(self.tokens, 1)

    @property
    def drift(self) -> Tensor | None:
        """D, the mean over tokens; None when no originals were given."""
        return None if self._drift is None else self._drift / max(self.tokens, 1)


@dataclass(frozen=True)
class Factor:
    """What rounding needs to know of the inputs; columns are in the order in which they are rounded."""

    order: Tensor  # [in]: the column that comes first, second, ...
    upper: Tensor  # U [in, in]
    squares: Tensor  # H [in, in], undamped, its columns where they were
    drift: Tensor | None  # alpha P [in, in], zero on and below the diagonal
    damping: float  # the share of the mean diagonal that was added
    dead: int  # inputs that were always zero


def inverse_factor(
    hessian: Tensor, damp: float = DAMP, order: Tensor | None = None
) -> tuple[Tensor, float] | None:
    """Return (U, damping used) with ``U^T U = (H + damping mean(diag H) I)^-1``; None when every attempt fails.

    H ``[in, in]`` is taken with its columns and rows in `order`; dead ones count as the mean of the others. With all
    of them reversed, U is the inverse of an ordinary Cholesky factor: one factorisation and one triangular solve,
    where factoring an explicit inverse needs two and loses digits.
    """
    diagonal = hessian.diagonal()
    order = torch.arange(len(diagonal), device=diagonal.device) if order is None else order
    last_first = order.flip(0)
    dead = diagonal == 0
    live = diagonal[~dead]
    mean = live.mean() if len(live) else diagonal.new_ones(())
    for retry in RETRIES:
        damping = damp * retry
        # Two matrices, used twice each: of a wide layer each is gigabytes, and new memory costs more than the arithmetic.
        gathered = hessian.index_select(0, last_first)
        damped = gathered.index_select(1, last_first)
        damped.diagonal()[dead[last_first]] = mean
        damped.diagonal().add_(damping * mean)
        lower, failed = gathered.T, torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(damped, out=(lower, failed))
        if failed.item() or not lower.diagonal().isfinite().all():
            continue
        _invert_lower(lower, damped.zero_())
        del gathered, lower
        upper = damped.flip(0, 1)
        if upper.sum().isfinite() or upper.isfinite().all():
            return upper, damping
    return None


def _invert_lower(lower: Tensor, inverse: Tensor) -> None:
    """Write the inverse of a lower triangular matrix into zeros, by halves: a third of the work of solving for the identity."""
    size = len(lower)
    if size <= LEAF:
        identity = torch.eye(size, device=lower.device)
        inverse.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, last = inverse[:half, :half], inverse[half:, half:]
    _invert_lower(lower[:half, :half], first)
    _invert_lower(lower[half:, half:], last)
    inverse[half:, :half] = last @ (lower[half:, :half] @ first).neg_()


def factorize(
    hessian: Hessian, *, act_order: bool = True, damp: float = DAMP, alpha: float = ALPHA
) -> Factor | None:
    """Prepare the rounding of all layers that read one input; None when H cannot be factored, damped or not."""
    squares = hessian.matrix
    diagonal = squares.diagonal()
    dead = int((diagonal == 0).sum())
    columns = torch.arange(len(diagonal), device=diagonal.device)
    order = diagonal.argsort(descending=True, stable=True) if act_order else columns
    found = inverse_factor(squares, damp, order)
    if found is None:
        return None
    upper, damping = found
    drift = hessian.drift
    drift = drift if alpha else None
    if drift is not None:
        drift = alpha * (drift[order[:, None], order] @ upper.T).triu_(1) @ upper
    return Factor(order, upper, squares, drift, damping, dead)


def gptq(weight: Tensor, factor: Factor, rounded: Quantized) -> Quantized:
    """Choose the codes of a weight ``[out, in]``; scales and zero points are those of `rounded`.

    `rounded` is the same weight rounded to nearest: its scales are in the type in which they will be stored, so
    the errors that are passed on here are those that an engine makes.
    """
    return together([weight], factor, [rounded])[0]


def together(weights: Sequence[Tensor], factor: Factor, rounded: Sequence[Quantized]) -> list[Quantized]:
    """Choose the codes of all weights ``[out, in]`` that read one input, as `gptq` does of each."""
    kinds: dict[object, list[int]] = {}  # one pass over the columns for each grid and tiling
    for number, each in enumerate(rounded):
        kinds.setdefault((each.quant.format, each.zero is None, _tile(each)[1]), []).append(number)
    found = list(rounded)
    for alike in kinds.values():
        stacked = torch.cat([weights[number].float() for number in alike])
        codes = _codes(stacked, factor, [rounded[number] for number in alike])
        parts = torch.split(codes, [len(weights[number]) for number in alike])
        for number, part in zip(alike, parts, strict=True):
            found[number] = replace(rounded[number], codes=part)
    return found


def _codes(stacked: Tensor, factor: Factor, rounded: Sequence[Quantized]) -> Tensor:
    """Return the codes ``[rows, in]`` of weights on top of each other, each with its own scales, on one grid."""
    grid, tile, width = rounded[0].quant.format, _tile(rounded[0])[1], stacked.shape[1]
    scales = torch.cat([_by_row(each.scale, each) for each in rounded])  # [rows, tiles across]
    zeros = [_by_row(each.zero, each) for each in rounded if each.zero is not None]
    offsets = torch.cat(zeros) if zeros else None
    order, upper, drift = factor.order, factor.upper, factor.drift
    work = stacked.index_select(1, order).T.contiguous()  # [in, rows], so that a column of W is contiguous
    codes = torch.empty_like(work, dtype=STORAGE[grid.kind])
    for start in range(0, width, LAZY):
        stop = min(start + LAZY, width)
        tiles = order[start:stop] // tile
        scale = scales[:, tiles].T.contiguous()
        zero = None if offsets is None else offsets[:, tiles].T.contiguous()
        errors = torch.empty_like(scale)
        # What an error in a column of the block does to later columns.
        effect = upper[start:stop, start:] / upper.diagonal()[start:stop, None]
        within = None if drift is None else drift[start:stop, start:stop]
        chosen = _round_block(work[start:stop], errors, effect[:, : stop - start], within, scale, zero, grid)
        codes[start:stop] = chosen.to(codes.dtype)
        work[stop:].addmm_(effect[:, stop - start :].T, errors, alpha=-1)
        if drift is not None:
            work[stop:].addmm_(drift[start:stop, stop:].T, work[start:stop])
    in_place: Tensor = codes.view(torch.uint8)[order.argsort()].T.contiguous().view(codes.dtype)
    return in_place


def _tile(rounded: Quantized) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    return tile_of(rounded.quant.granularity, (rounded.codes.shape[0], rounded.codes.shape[1]))


def _by_row(per_tile: Tensor, rounded: Quantized) -> Tensor:
    """Repeat what is known of tiles for each row: ``[tiles down, tiles across] -> [out, tiles across]``."""
    return spread(per_tile.float(), (_tile(rounded)[0], 1), (len(rounded.codes), per_tile.shape[1]))


def _round_block(
    block: Tensor,
    errors: Tensor,
    effect: Tensor,
    drift: Tensor | None,
    scale: Tensor,
    zero: Tensor | None,
    grid: Format,
) -> Tensor:
    """Round the columns of a lazy block ``[columns, out]``, write their errors, return their codes in float32.

    `block` keeps each column's value from just before it was rounded. Calls are few, for each costs more than its
    arithmetic: a column holds some thousand numbers.
    """
    chosen, count = torch.empty_like(block), len(block)
    columns = [block.unbind(), chosen.unbind(), errors.unbind(), scale.unbind()]
    centres = None if zero is None else zero.unbind()
    for start in range(0, count, INNER):
        stop = min(start + INNER, count)
        for row in range(start, stop):
            value, code, error, step = (column[row] for column in columns)
            centre = None if centres is None else centres[row]
            torch.div(value, step, out=code)
            if centre is not None:
                code.add_(centre)
            round_in_place(code, grid)
            torch.addcmul(value, code if centre is None else code - centre, step, value=-1, out=error)
            block[row + 1 : stop].addr_(effect[row, row + 1 : stop], error, alpha=-1)
            if drift is not None:
                block[row + 1 : stop].addr_(drift[row, row + 1 : stop], value)
        block[stop:].addmm_(effect[start:stop, stop:].T, errors[start:stop], alpha=-1)
        if drift is not None:
            block[stop:].addmm_(drift[start:stop, stop:].T, block[start:stop])
    return chosen


def round_in_place(values: Tensor, grid: Format) -> Tensor:
    """Replace float32 values by their codes, as `round_to` chooses them, still in float32."""
    if grid.kind == "int":
        return values.round_().clamp_(grid.low, grid.high)
    return values.copy_(round_to(values, grid))


def output_error(weight: Tensor, quantized: Quantized, hessian: Tensor) -> float:
    """Return how much of the layer's output is lost: ``sqrt(Tr(E H E^T) / Tr(W H W^T))``, ``E = W - Q``.

    For the report: of up to `JUDGED` rows, evenly spaced, to three digits.
    """
    rows = slice(None, None, -(-len(weight) // JUDGED))
    exact = weight[rows].float()
    both = torch.cat([exact - quantized.dequantize()[rows], exact])
    costs = Quadratic(hessian)(both)
    noise, signal = (part.sum().item() for part in torch.split(costs, len(exact)))
    return math.sqrt(max(noise, 0.0) / signal) if signal > 0 else 0.0
