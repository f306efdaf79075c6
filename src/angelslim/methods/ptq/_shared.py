"""What methods of post-training quantization share: rounding, groups of layers, static input ranges.

Engines fuse q, k, v and gate, up into one matrix with one per-tensor scale, and would round a second time if
the members' scales differed. So linears that share an input share their per-tensor weight scale and their
input scale, whatever method chooses the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.select import Layer
from ...models.walk import Block
from ...numerics.error import Histogram
from ...numerics.observers import Observer
from ...numerics.quantize import (
    TINY,
    Quantized,
    fake_quantize,
    quantize,
    quantize_with,
    scales_from_range,
    tile_range,
)
from ...numerics.scheme import PER_TENSOR, Quant

PROBE_VALUES = 1 << 16  # inputs kept per layer for the before/after histogram


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


def head_of(block: Block, layer: Layer) -> str:
    """Return the module path of the linear whose inputs stand for all of the layer's group."""
    assert layer.module is not None
    group = block.groups.get(layer.module)
    return group.linears[0] if group else layer.module


def by_group(block: Block) -> list[list[Layer]]:
    """Return the block's layers, those that share an input together."""
    groups: dict[object, list[Layer]] = {}
    for layer in block.layers:
        groups.setdefault(block.groups.get(layer.module or "", layer.name), []).append(layer)
    return list(groups.values())


def shared_scale(block: Block, members: list[Layer]) -> Tensor | None:
    """Return the one scale ``[1, 1]`` that covers all members; None unless scales are symmetric per-tensor ones."""
    quant = members[0].scheme.weight
    if len(members) < 2 or quant.granularity != PER_TENSOR or not quant.symmetric:
        return None
    ranges = [tile_range(block.weight(layer), quant.granularity) for layer in members]
    low = torch.stack([low for low, _ in ranges]).amin(0)
    high = torch.stack([high for _, high in ranges]).amax(0)
    return scales_from_range(low, high, quant)[0]
