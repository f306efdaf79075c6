"""How much a quantized tensor differs from the original: SQNR, relative error, histograms.

SQNR (signal to quantization noise ratio, in dB) is ``10 log10(sum x^2 / sum (x - q)^2)``: each bit of an
integer format is worth about 6 dB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 64
PART = 1 << 16  # values worked on at a time: what is in between stays in the processor's cache
SAMPLE = 1 << 16  # values that a histogram looks at: a thousand a bin


@dataclass(frozen=True)
class Histogram:
    """Counts of a tensor's values before and after quantization over the same equal bins of [low, high]."""

    low: float
    high: float
    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, before: Tensor, after: Tensor, bins: int = BINS) -> Histogram:
        """Bin two tensors of one shape over the range of the first, all of it; large ones are counted by a regular sample."""
        step = max(1, before.numel() // SAMPLE) | 1  # odd, so that no column of a matrix is favoured
        low, high = (float(end) for end in torch.aminmax(before))
        before, after = before.reshape(-1)[::step], after.reshape(-1)[::step]
        high = high if high > low else low + 1.0
        count = []
        for tensor in (before, after):
            parts = [torch.histc(part.float().clamp(low, high), bins, low, high) for part in _parts(tensor)]
            count.append(torch.stack(parts).long().sum(0).tolist())
        return cls(low, high, count[0], count[1])


@dataclass(frozen=True)
class LayerRecord:
    """What quantization did to one linear layer."""

    name: str
    block: int | None  # decoder block index, None outside the stack
    scheme: str
    shape: tuple[int, int]  # (out, in)
    bits_per_weight: float  # stored bits, scales and zero points included
    sqnr_db: float
    relative_error: float  # ||W - Q||_F / ||W||_F
    weights: Histogram | None = None
    activations: Histogram | None = None
    input_scale: float | None = None  # static per-tensor activation scale
    output_error: float | None = (
        None  # of the layer's outputs on the calibration inputs, where a method knows it
    )
    note: str = ""  # what a reader has to know, such as a layer that a method could only round
    choice: str = ""  # what a search settled on for the layer, and what that gained

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LayerRecord:
        """Rebuild from the dictionary that ``dataclasses.asdict`` made, also after JSON."""
        histograms = {
            key: Histogram(**raw[key]) if raw.get(key) else None for key in ("weights", "activations")
        }
        return cls(**{**raw, **histograms, "shape": tuple(raw["shape"])})


def error_of(original: Tensor, quantized: Tensor) -> tuple[float, float]:
    """Return (SQNR in dB, relative error) of two tensors of one shape.

    The relative error is ``||x - q|| / ||x||`` in the Frobenius norm. Nothing lost gives (inf, 0). Squares are
    float32, their sums pairwise: exact to about six digits, at the price of one pass over memory, a part at a time.

    >>> error_of(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    (20.0, 0.1)
    """
    signal = noise = 0.0
    for before, after in zip(_parts(original.reshape(-1)), _parts(quantized.reshape(-1)), strict=True):
        exact = before.float()
        signal += exact.square().sum().item()
        noise += (exact - after.float()).square_().sum().item()
    if noise == 0:
        return math.inf, 0.0
    ratio = noise / max(signal, 1e-300)
    return -10 * math.log10(ratio), math.sqrt(ratio)


def _parts(values: Tensor) -> list[Tensor]:
    """Divide a vector for the processor; accelerators get it whole, since each part costs them a launch."""
    size = PART if values.device.type == "cpu" else max(values.numel(), 1)
    return [values[start : start + size] for start in range(0, values.numel(), size)]
