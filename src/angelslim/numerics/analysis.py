"""What a tensor's values look like, and how its quantized copy differs: the arithmetic of ``angelslim analyze``.

*One tensor* (`describe`): the largest magnitude, the magnitudes below which 99.9 % and 99.99 % of the values lie,
the standard deviation, and the kurtosis ``E (x - m)^4 / (E (x - m)^2)^2`` (3 for a normal distribution; weights of
language models have 3 to 10, a matrix with outlier channels hundreds). The percentiles are exact order statistics
(nearest rank), and nothing is sorted: the bits of non-negative floats order like integers, so one pass counts their
upper 16 bits and a second one the lower 16 of those that share the bucket of a wanted rank (a radix selection).

*Two tensors of one shape* (`compare`), the original and what its codes stand for, over the same bins:

=============  ======================================================================================
SQNR           ``10 log10(sum x^2 / sum (x - q)^2)`` in dB
KL             Kullback-Leibler divergence of the original's distribution from the copy's, in nats, over
               the `PLOT_BINS` equal bins that a picture shows; half a count is added to each, so empty
               ones stay finite. Finer bins than the format's steps would measure the steps
Wasserstein-1  how far, in units of the weight, mass has to be moved on average to turn one distribution
               into the other: the area between the two cumulative curves, read off `BINS` bins and so
               within ``width of a bin = (high - low) / BINS`` of the exact figure
flushed        share of the nonzero originals that became zero
=============  ======================================================================================

*Codes and scales* (`at_limit`, `clipped`): the share of codes at either end of the number format, and the share of
originals that lie beyond what the ends stand for. Some codes at the ends are as it should be (each tile's largest
value lands there); clipped values are a choice, or a mistake.

Every function takes float32 chunks of `CHUNK` values at a time and sums in float64: memory beside the tensors
is a few chunks, whatever their size. Values must be finite; callers check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .error import Histogram
from .quantize import Quantized, round_to
from .scheme import Format

CHUNK = 1 << 18  # values; what is in between stays in the cache
BINS = 1 << 16  # resolution of the distributions that are compared
PLOT_BINS = 1 << 7  # of those that are drawn
MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is 0.6745 sigma
SLACK = 2**-7  # scales that are stored in bfloat16 are that far off, and clip nothing by it


@dataclass(frozen=True)
class Spread:
    """The distribution of one tensor's values."""

    amax: float
    p999: float  # 99.9 % of the magnitudes are at most this
    p9999: float  # 99.99 %
    std: float
    kurtosis: float  # 3 for a normal distribution; 0 for a constant


@dataclass(frozen=True)
class Difference:
    """How a tensor's quantized copy differs from it."""

    sqnr_db: float  # infinite when nothing was lost
    relative_error: float  # ||x - q|| / ||x||
    max_error: float  # largest |x - q|
    mean_error: float  # mean |x - q|
    kl: float  # nats
    wasserstein: float  # in units of the values
    flushed: float  # share of nonzero values that became zero
    histogram: Histogram  # both distributions over the same `PLOT_BINS` bins


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same stretch of each tensor, flat and in float32."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), CHUNK):
        yield tuple(tensor[start : start + CHUNK].float() for tensor in flat)


def is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor is free of NaN and infinity; the other functions rely on it."""
    return all(bool(part.isfinite().all()) for (part,) in chunks(tensor))


def zero_share(tensor: Tensor) -> float:
    """Return the share of exact zeros."""
    return sum(int((part == 0).sum()) for (part,) in chunks(tensor)) / tensor.numel()


def describe(values: Tensor) -> Spread:
    """Describe the distribution of a tensor's values (at least one)."""
    count, total = values.numel(), 0.0
    for (part,) in chunks(values):
        total += part.sum(dtype=torch.float64).item()
    mean, second, fourth = total / count, 0.0, 0.0
    for (part,) in chunks(values):
        squares = (part - mean).square_()
        second += squares.sum(dtype=torch.float64).item()
        fourth += squares.square_().sum(dtype=torch.float64).item()
    p999, p9999, amax = magnitudes_at(values, [_rank(0.999, count), _rank(0.9999, count), count])
    kurtosis = count * fourth / second**2 if second > 0 else 0.0
    return Spread(amax, p999, p9999, math.sqrt(second / count), kurtosis)


def _rank(share: float, count: int) -> int:
    """Return the nearest rank, 1-based: the smallest one with at least `share` of the values up to it."""
    return max(1, math.ceil(share * count - 1e-6))


def magnitudes_at(values: Tensor, ranks: Sequence[int]) -> list[float]:
    """Return the magnitudes with the given 1-based ranks in ascending order, exactly, without sorting."""
    upper = torch.zeros(1 << 15, dtype=torch.int64)
    for (part,) in chunks(values):
        upper += torch.bincount(_bits(part) >> 16, minlength=1 << 15).cpu()
    ends = upper.cumsum(0)
    buckets = [int(torch.searchsorted(ends, rank)) for rank in ranks]
    lower = {bucket: torch.zeros(1 << 16, dtype=torch.int64) for bucket in set(buckets)}
    for (part,) in chunks(values):
        bits = _bits(part)
        for bucket, counts in lower.items():
            counts += torch.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16).cpu()
    found = []
    for rank, bucket in zip(ranks, buckets, strict=True):
        before = int(ends[bucket - 1]) if bucket else 0
        last = int(torch.searchsorted(lower[bucket].cumsum(0), rank - before))
        bits = torch.tensor((bucket << 16) | last, dtype=torch.int32)
        found.append(bits.view(torch.float32).item())
    return found


def _bits(part: Tensor) -> Tensor:
    return part.abs().view(torch.int32)


def compare(original: Tensor, restored: Tensor) -> Difference:
    """Compare a tensor with what its quantized codes stand for."""
    low = min(part.min().item() for pair in chunks(original, restored) for part in pair)
    high = max(part.max().item() for pair in chunks(original, restored) for part in pair)
    high = high if high > low else low + 1.0
    counts = torch.zeros(2, BINS, dtype=torch.int64)
    signal = noise = absolute = largest = 0.0
    nonzero = flushed = 0
    for exact, copy in chunks(original, restored):
        for row, part in enumerate((exact, copy)):
            place = ((part - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
            counts[row] += torch.bincount(place, minlength=BINS).cpu()
        live = exact != 0
        nonzero += int(live.sum())
        flushed += int((live & (copy == 0)).sum())
        signal += exact.square().sum(dtype=torch.float64).item()
        error = (exact - copy).abs_()
        largest = max(largest, error.max().item())
        absolute += error.sum(dtype=torch.float64).item()
        noise += error.square_().sum(dtype=torch.float64).item()
    ratio = noise / max(signal, 1e-300)
    plot = counts.view(2, PLOT_BINS, -1).sum(2)
    return Difference(
        sqnr_db=-10 * math.log10(ratio) if noise else math.inf,
        relative_error=math.sqrt(ratio) if noise else 0.0,
        max_error=largest,
        mean_error=absolute / original.numel(),
        kl=kl_divergence(plot[0], plot[1]),
        wasserstein=wasserstein(counts[0], counts[1], (high - low) / BINS),
        flushed=flushed / max(nonzero, 1),
        histogram=Histogram(low, high, plot[0].tolist(), plot[1].tolist()),
    )


def kl_divergence(before: Tensor, after: Tensor) -> float:
    """Return ``sum p ln(p / q)`` in nats of two counts over the same bins, half a count added to each bin."""
    p, q = ((counts.double() + 0.5) / (counts.sum() + counts.numel() / 2) for counts in (before, after))
    return max(0.0, (p * (p / q).log()).sum().item())


def wasserstein(before: Tensor, after: Tensor, width: float) -> float:
    """Return the Wasserstein-1 distance of two counts over the same bins of `width`, to within one width."""
    gap = before.cumsum(0).double() / before.sum() - after.cumsum(0).double() / after.sum()
    return gap.abs().sum().item() * width


def at_limit(weight: Quantized) -> float:
    """Return the share of codes at the smallest or the largest value of the format."""
    grid, count = weight.quant.format, 0
    for (part,) in chunks(weight.codes):
        count += int(((part <= grid.low) | (part >= grid.high)).sum())
    return count / weight.codes.numel()


def clipped(original: Tensor, weight: Quantized) -> float:
    """Return the share of originals that lie beyond the values of the last codes, by more than rounding explains.

    Up to half a step beyond the last code, a value is rounded to it like any other.
    """
    grid, half, count = weight.quant.format, last_step(weight.quant.format) / 2, 0
    base = _standing_for(weight, 0.0) if weight.zero is not None else None
    unit = _standing_for(weight, 1.0) if base is None else _standing_for(weight, 1.0) - base
    low, high = (grid.low - half) * (1 + SLACK), (grid.high + half) * (1 + SLACK)
    for exact, step, *rest in chunks(original, unit, *([] if base is None else [base])):
        shifted = exact - rest[0] if rest else exact
        count += int(((shifted > step * high) | (shifted < step * low)).sum())
    return count / original.numel()


def _standing_for(weight: Quantized, code: float) -> Tensor:
    """Return the values ``[out, in]`` that one code would have in each place; they are linear in the code."""
    same = torch.full((1, 1), code).to(weight.codes.dtype).to(weight.codes.device)
    return replace(weight, codes=same.expand_as(weight.codes)).dequantize()


def last_step(grid: Format) -> float:
    """Return the distance of the format's two largest values.

    >>> from .scheme import FORMATS
    >>> last_step(FORMATS["int4"]), last_step(FORMATS["fp8_e4m3"])
    (1.0, 32.0)
    """
    if grid.kind == "int":
        return 1.0
    near = round_to(torch.linspace(grid.high / 2, grid.high, 257), grid).float()
    return grid.high - near[near < grid.high].max().item()


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's correlation: 1 when both put things in the same order, 0 when the orders are unrelated.

    Equal values share the mean of their ranks. Constant values correlate with nothing.

    >>> rank_correlation([1, 2, 3, 4], [10, 20, 40, 30])
    0.8
    """
    x, y = (_ranks(torch.tensor(list(values), dtype=torch.float64)) for values in (one, other))
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(x.square().sum().item() * y.square().sum().item())
    return round((x * y).sum().item() / size, 12) if size > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return below + (equal + 1) / 2


def robust_scores(values: Sequence[float], floor: float = 0.0) -> list[float]:
    """Return how many robust standard deviations each value lies above the median.

    The deviation is the median absolute one (Iglewicz and Hoaglin 1993), which a few outliers cannot blow up, and at
    least `floor`: values that hardly differ are all ordinary. Values that all agree score 0.

    >>> robust_scores([1.0, 2.0, 3.0, 4.0, 100.0], floor=0.1)[-1] > 60
    True
    """
    if not values:
        return []
    exact = torch.tensor(list(values), dtype=torch.float64)
    distance = exact - exact.quantile(0.5)
    deviation = max(MAD_TO_SIGMA * distance.abs().quantile(0.5).item(), floor)
    return (distance / deviation).tolist() if deviation > 0 else [0.0] * len(exact)
