"""LeptoQuant: a static FP8 scale whose largest code is that of an outlier, not that of the largest value.

The method of AngelSlim (arXiv 2602.21233, equations 5 to 7) scales a tensor x to FP8 as usual, looks up D, the code
value above which only a share alpha of the codes lies, and takes ``max|x| / D`` as the scale instead of
``max|x| / 448``. alpha runs over [0, 0.001]; 0 gives D = 448, the ordinary static scale. What alpha is best is asked
of the output of the block (`methods.ptq.lepto`); this module makes the candidates and predicts which deserve asking.

What such a scale can do follows from the grid. D is at most 448, so the scale only *grows*: nothing ever saturates,
small values lose codes, and where the relative precision of a floating-point grid is the same everywhere, all that
changes is where values fall between two powers of two (the *phase*). Gains are small, and a single huge value gives
a D near zero that would ruin the tensor: `FLOOR` bounds it. `candidates` therefore knows a second, wider set beside
the paper's: scales that are *smaller* and clip the largest values, and scales that only shift the phase.

`MagnitudeCounts` makes all of this cheap. It counts the magnitudes by their bfloat16 bit pattern, 32,640 bins that
cover every finite number with 128 bins an octave, exact for bfloat16 activations and 16 bins wide a step of FP8 for
others. Beside each count it sums a weight for each input channel. One pass over the data then gives any quantile,
and the weighted squared error of any scale, in one sum over the bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..base import parallel
from .quantize import TINY, round_to
from .scheme import Format

ALPHAS = tuple(step * 5e-5 for step in range(1, 21))  # the shares of isolated outliers that are tried
FLOOR = 64.0  # D at least: a scale at most seven times the ordinary one
CLIPS = tuple(1 - step / 20 for step in range(1, 11))  # 0.95 ... 0.5 of the ordinary scale: outliers saturate
PHASES = tuple(2 ** (step / 8) for step in range(1, 8))  # within an octave above the ordinary scale
PATTERNS = 0x7F80  # bit patterns of the finite bfloat16 magnitudes
CHUNK = 1 << 20  # values counted at a time


@dataclass(frozen=True)
class Candidate:
    """A scale ``[1, 1]`` float32 that could be chosen, and where it comes from."""

    name: str
    scale: Tensor


class MagnitudeCounts:
    """How often each magnitude was seen, and how much it weighs."""

    def __init__(self, channel_weights: Tensor) -> None:
        """Weigh squared errors of input channel j by ``channel_weights[j]``, a vector ``[in]``."""
        self.channel_weights = channel_weights.double()
        self.counts = torch.zeros(PATTERNS, dtype=torch.int64, device=channel_weights.device)
        self.weights = torch.zeros(PATTERNS, dtype=torch.float64, device=channel_weights.device)

    def update(self, values: Tensor) -> None:
        """Take in inputs ``[tokens, in]``."""
        for rows in torch.split(values, max(1, CHUNK // values.shape[1])):
            # A value above bfloat16's largest number would round to infinity; it belongs to the last bin.
            pattern = rows.abs().to(torch.bfloat16).view(torch.int16).clamp(max=PATTERNS - 1).flatten()
            weights = self.channel_weights.expand(rows.shape).flatten()
            self.counts += torch.bincount(pattern, minlength=PATTERNS)
            self.weights += torch.bincount(pattern, weights, PATTERNS)

    def merge(self) -> None:
        """Add what the other processes of the run have seen."""
        self.counts, self.weights = parallel.total(self.counts), parallel.total(self.weights)

    def outlier(self, alpha: float) -> float:
        """Return the magnitude above which at most a share `alpha` of all values lies; 0 when nothing was seen."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0
        rank = total - math.floor(alpha * total)
        reached = torch.searchsorted(self.counts.cumsum(0), rank)
        return float(_magnitudes(reached.reshape(1)))

    def error(self, scale: Tensor, grid: Format) -> float:
        """Return the weighted squared error of all values when they are rounded to `grid` with `scale`.

        With the squared column norms of a weight as channel weights this is the expected squared error of the
        layer's outputs, if the errors of different channels are unrelated.
        """
        used = self.counts.nonzero().flatten()
        values, step = _magnitudes(used), scale.float().to(used.device).reshape(1)
        lost = values - round_to(values / step, grid).float() * step
        return float(lost.double().square() @ self.weights[used])


def _magnitudes(patterns: Tensor) -> Tensor:
    return patterns.to(torch.int16).view(torch.bfloat16).float()


def denominator(counts: MagnitudeCounts, amax: float, alpha: float, grid: Format) -> float:
    """Return D: the code value of the outlier at `alpha` once the tensor is scaled by ``amax`` / largest code."""
    scaled = torch.tensor([counts.outlier(alpha) if alpha > 0 else amax]) / max(amax, TINY) * grid.high
    return float(round_to(scaled, grid).float())


def candidates(
    counts: MagnitudeCounts, amax: float, grid: Format, *, extended: bool = False
) -> list[Candidate]:
    """Return the scales to choose from, the ordinary one first; shares that give the same D are tried once."""
    top = torch.tensor([[amax]])
    found = {grid.high: "alpha 0"}
    for alpha in ALPHAS:
        code = denominator(counts, amax, alpha, grid)
        if code >= FLOOR:
            found.setdefault(code, f"alpha {alpha:g}")
    scales = [Candidate(name, (top / code).clamp(min=TINY)) for code, name in found.items()]
    if extended:
        plain = scales[0].scale
        scales += [Candidate(f"clip {share:g}", plain * share) for share in CLIPS]
        scales += [Candidate(f"phase {factor:.3f}", plain * factor) for factor in PHASES]
    return scales


def shortlist(
    counts: MagnitudeCounts, found: list[Candidate], grid: Format, keep: int
) -> tuple[list[Candidate], float]:
    """Return the `keep` candidates with the least predicted error, best first, and what share the best takes off.

    Only candidates that beat the first are listed; without any the share is 0.
    """
    errors = parallel.spread([partial(counts.error, candidate.scale, grid) for candidate in found])
    better = sorted((error, index) for index, error in enumerate(errors) if error < errors[0])
    return [found[index] for _, index in better[:keep]], 1 - better[0][0] / errors[0] if better else 0.0
