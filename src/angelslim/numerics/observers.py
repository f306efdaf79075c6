"""Static activation scales: watch a layer's inputs during calibration, then choose one range.

* ``absmax``: the largest magnitude seen; nothing saturates.
* ``percentile``: the magnitude below which a given share of all values lies; rare outliers saturate.
* ``mse``: the range whose quantized values are closest to the originals in mean squared error.

The last two read a histogram of magnitudes. Its bin width is a power of two that doubles (merging neighbours
exactly) when a larger value arrives, so the result depends on the data only, never on batch size or order.
Padded positions must not be passed in.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ..base import parallel
from ..base.errors import ConfigError, did_you_mean
from .quantize import round_to
from .scheme import Format

BINS = 8192


class Observer(Protocol):
    """Accumulates inputs of one layer; `amax` is the magnitude that the largest code shall stand for."""

    def update(self, values: Tensor) -> None:
        """Take in a tensor of any shape."""

    def merge(self) -> None:
        """Take in what the other processes of the run have seen."""

    def amax(self) -> float:
        """Return the chosen range; 0 when nothing was seen."""


class AbsMax:
    """The largest magnitude seen."""

    def __init__(self) -> None:
        self._amax = 0.0

    def update(self, values: Tensor) -> None:
        """Take in a tensor of any shape."""
        low, high = torch.aminmax(values)
        self._amax = max(self._amax, -low.item(), high.item())

    def merge(self) -> None:
        """Take in what the other processes of the run have seen."""
        self._amax = parallel.highest(torch.tensor(self._amax, dtype=torch.float64)).item()

    def amax(self) -> float:
        """Return the largest magnitude."""
        return self._amax


class MagnitudeHistogram:
    """Counts of |x| in `BINS` bins of a width ``2^k`` that grows with the data."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.width = 0.0  # none until the first nonzero value

    def update(self, values: Tensor) -> None:
        """Take in a tensor of any shape."""
        magnitudes = values.detach().float().abs().flatten()
        top = magnitudes.max().item() if magnitudes.numel() else 0.0
        if top > 0:
            self._grow(2.0 ** math.ceil(math.log2(top / BINS) + 1e-9))
        if self.width == 0.0:
            self.counts[0] += magnitudes.numel()
            return
        index = (magnitudes / self.width).long().clamp(max=BINS - 1)
        self.counts += torch.bincount(index, minlength=BINS).cpu()

    def _grow(self, width: float) -> None:
        self.width = self.width or width
        while self.width < width:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.width *= 2

    def merge(self) -> None:
        """Take in what the other processes of the run have seen; exact, as counts are whole numbers."""
        width = parallel.highest(torch.tensor(self.width, dtype=torch.float64)).item()
        if width > 0:
            self._grow(width)
        self.counts = parallel.total(self.counts)

    def quantile(self, share: float) -> float:
        """Return the smallest bin edge below which at least `share` of all values lie."""
        total = int(self.counts.sum())
        if total == 0 or self.width == 0.0:
            return 0.0
        reached = torch.searchsorted(self.counts.cumsum(0), math.ceil(share * total))
        return (int(reached) + 1) * self.width

    def centres(self) -> Tensor:
        """Return the middle of each bin, ``[BINS]`` float32."""
        return (torch.arange(BINS, dtype=torch.float32) + 0.5) * (self.width or 1.0)


class Percentile(MagnitudeHistogram):
    """The magnitude below which `percent` of the values lie."""

    def __init__(self, percent: float = 99.99) -> None:
        super().__init__()
        self.percent = percent

    def amax(self) -> float:
        """Return the percentile, rounded up to a bin edge."""
        return self.quantile(self.percent / 100)


class MinimumError(MagnitudeHistogram):
    """The range with the least mean squared quantization error on `grid`, among 80 shrunken ones."""

    STEPS = 80

    def __init__(self, grid: Format) -> None:
        super().__init__()
        self.grid = grid

    def amax(self) -> float:
        """Return the best range; the full range is always a candidate."""
        full = self.quantile(1.0)
        used = self.counts.nonzero().flatten()
        if full == 0.0:
            return 0.0
        values, weights = self.centres()[used], self.counts[used].double()
        best, best_error = full, math.inf
        for step in range(self.STEPS):
            amax = full * (1 - step / self.STEPS)
            scale = amax / self.grid.high
            error = (values - round_to(values / scale, self.grid).float() * scale).double().square() @ weights
            if error.item() < best_error:
                best, best_error = amax, error.item()
        return best


KINDS = ("absmax", "percentile", "mse")


def make_observer(kind: str, grid: Format, percent: float = 99.99) -> Observer:
    """Build the observer called `kind` for values that will be stored on `grid`."""
    if kind == "absmax" or (kind in KINDS and grid.bits == 4):
        return AbsMax()  # the static part of a four-bit input's scales has only to cover the others
    if kind == "percentile":
        return Percentile(percent)
    if kind == "mse":
        return MinimumError(grid)
    raise ConfigError(f"Unknown observer {kind!r}.", fix=did_you_mean(kind, KINDS))
