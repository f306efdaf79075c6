"""Round to nearest: the baseline that every other algorithm has to beat.

Each weight goes to the closest code of its tile's grid, with scales from the tile's largest magnitude. Dynamic
activation scales need nothing more. Static ones are one number per layer, taken from the calibration inputs by
an observer (``absmax``, ``percentile`` or ``mse``).

Engines fuse q, k, v and gate, up into one matrix with one per-tensor scale, and would round a second time if
the members' scales differed. So linears that share an input share their per-tensor weight scale and their
input scale here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...models.select import Layer
from ...models.walk import Block
from ...numerics.error import Histogram
from ...numerics.observers import Observer, make_observer
from ...numerics.quantize import (
    TINY,
    Quantized,
    fake_quantize,
    quantize,
    quantize_with,
    scales_from_range,
    tile_range,
)
from ...numerics.scheme import PER_TENSOR, Quant, Scheme, format_named

PROBE_VALUES = 1 << 16  # inputs kept per layer for the before/after histogram


class RoundToNearest:
    """Options: `observer`, `percentile` (static activations only)."""

    reads = frozenset({"observer", "percentile"})

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.observer = str(options.get("observer", "absmax"))
        self.percent = float(options.get("percentile", 99.99))
        make_observer(self.observer, format_named("fp8_e4m3"), self.percent)  # an unknown name fails now

    def needs_data(self, scheme: Scheme) -> bool:
        """Only static activation scales need data."""
        return scheme.needs_data

    def process(self, block: Block) -> None:
        """Round every layer; observe inputs first where the scheme is static."""
        inputs = self._observe(block) if block.samples else {}
        for members in _by_group(block):
            self._round_group(block, members, inputs)

    def _observe(self, block: Block) -> dict[str, InputStatistics]:
        """Run the samples through the unquantized block, watching each group's input once."""
        watched: dict[str, InputStatistics] = {}
        heads: dict[str, InputStatistics] = {}
        for layer in block.layers:
            assert layer.module is not None and layer.scheme.input is not None
            group = block.groups.get(layer.module)
            head = group.linears[0] if group else layer.module
            if head not in heads:
                heads[head] = InputStatistics(
                    make_observer(self.observer, layer.scheme.input.format, self.percent)
                )
            watched[layer.module] = heads[head]
        block.advance({path: statistics.update for path, statistics in heads.items()})
        return watched

    def _round_group(self, block: Block, members: list[Layer], inputs: dict[str, InputStatistics]) -> None:
        shared = _shared_scale(block, members)
        for layer in members:
            weight = block.weight(layer)
            quantized = round_weight(weight, layer.scheme.weight, shared)
            statistics = inputs.get(layer.module or "")
            if statistics is None or layer.scheme.input is None:
                block.emit(layer, weight, quantized)
                continue
            scale = statistics.scale(layer.scheme.input)
            block.emit(layer, weight, quantized, scale, statistics.histogram(layer.scheme.input, scale))


class InputStatistics:
    """An observer of one tensor plus a small sample of its values for the report."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.values = torch.empty(0)

    def update(self, values: Tensor) -> None:
        """Take in one sample's inputs ``[tokens, in]``."""
        self.observer.update(values)
        room = PROBE_VALUES - self.values.numel()
        if room > 0:
            step = max(1, values.numel() // (PROBE_VALUES // 8))
            self.values = torch.cat([self.values, values.flatten()[::step][:room].float().cpu()])

    def scale(self, quant: Quant) -> Tensor:
        """Return the static scale ``[1, 1]`` in float32."""
        return (torch.tensor([[self.observer.amax()]]) / quant.format.high).clamp(min=TINY)

    def histogram(self, quant: Quant, scale: Tensor) -> Histogram:
        """Return the sampled inputs before and after quantization."""
        sample = self.values.reshape(1, -1)
        return Histogram.of(sample, fake_quantize(sample, quant, scale))


def round_weight(weight: Tensor, quant: Quant, shared_scale: Tensor | None = None) -> Quantized:
    """Round one weight ``[out, in]``; below 8 bits scales take the weight's own type, as engines keep them."""
    if shared_scale is not None:
        return quantize_with(weight, shared_scale.clone(), None, quant)
    return quantize(weight, quant, weight.dtype if quant.format.bits < 8 else torch.float32)


def _by_group(block: Block) -> list[list[Layer]]:
    groups: dict[object, list[Layer]] = {}
    for layer in block.layers:
        groups.setdefault(block.groups.get(layer.module or "", layer.name), []).append(layer)
    return list(groups.values())


def _shared_scale(block: Block, members: list[Layer]) -> Tensor | None:
    quant = members[0].scheme.weight
    if len(members) < 2 or quant.granularity != PER_TENSOR or not quant.symmetric:
        return None
    ranges = [tile_range(block.weight(layer), quant.granularity) for layer in members]
    low = torch.stack([low for low, _ in ranges]).amin(0)
    high = torch.stack([high for _, high in ranges]).amax(0)
    return scales_from_range(low, high, quant)[0]


METHOD = RoundToNearest
