"""How much the model's next-token distribution moves when one layer is rounded.

``KL(original || changed)`` in nats, averaged over the last `POSITIONS` tokens of each sample, which have the most
context. It is what perplexity and answers depend on, where a block's error may be repaired or blown up by the blocks
after it. The price is the whole model in memory, in float32, and one forward of every sample for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..base.console import bar
from ..evaluate.inference import inference, last_logits
from ..models.loading import Source
from ..models.select import Layer
from .rounding import InputRanges, Unit, computing_with, quantized_inputs, replace_weights, rounded

POSITIONS = 64


def divergences(
    source: Source,
    units: Sequence[Unit],
    samples: Sequence[Mapping[str, Tensor]],
    ranges: InputRanges,
    device: torch.device,
) -> tuple[dict[str, tuple[float, float | None]], float]:
    """Return each unit's (KL, standard error over the samples), and the KL with all units rounded at once.

    `source` computes in float32 (`rounding.precise`); `ranges` hold the static input scales, if any are needed.
    """
    found: dict[str, tuple[float, float | None]] = {}
    model = source.materialize("", device)
    try:
        with inference(model), bar("logits", len(units) + 1) as progress:
            before = [_logits(model, sample, device) for sample in samples]
            for unit in units:
                weights = rounded(source, unit, device).weights
                with computing_with(source, unit, weights, ranges, device):
                    found[unit.name] = _mean(
                        [_kl(p, model, sample, device) for p, sample in zip(before, samples, strict=True)]
                    )
                progress.advance()
            together = _together(source, units, samples, before, ranges, device)
            progress.advance()
    finally:
        source.free("")
    return found, together


def _together(
    source: Source,
    units: Sequence[Unit],
    samples: Sequence[Mapping[str, Tensor]],
    before: Sequence[Tensor],
    ranges: InputRanges,
    device: torch.device,
) -> float:
    """Return the KL with every unit rounded. The original weights are gone afterwards, which saves their memory."""
    sharing: dict[str, list[Layer]] = {}  # parameter -> its layers: gate and up of stacked experts share one
    for layer in (layer for unit in units for layer in unit.layers):
        sharing.setdefault(source.targets[layer.tensor].parameter, []).append(layer)
    for layers in sharing.values():
        part = Unit("", None, "", tuple(layers))
        replace_weights(source, layers, rounded(source, part, device).weights)
    every = [layer for layers in sharing.values() for layer in layers]
    with quantized_inputs(source, every, ranges, device):
        return _mean([_kl(p, source.model, s, device) for p, s in zip(before, samples, strict=True)])[0]


def _logits(model: torch.nn.Module, sample: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Return the logits of the last positions ``[positions, vocabulary]``."""
    inputs = {name: value.to(device) for name, value in sample.items()}
    count = min(POSITIONS, inputs["input_ids"].shape[1])
    logits: Tensor = model(**inputs, use_cache=False, **last_logits(model, count)).logits[0, -count:]
    return logits.float()


def _kl(before: Tensor, model: torch.nn.Module, sample: Mapping[str, Tensor], device: torch.device) -> float:
    """Return the mean KL over a sample's positions; in float64, since small ones are differences of equal numbers."""
    p, q = (logits.double().log_softmax(-1) for logits in (before, _logits(model, sample, device)))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error; None for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
