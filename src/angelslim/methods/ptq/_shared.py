"""What methods of post-training quantization share: rounding, groups of layers, static input ranges.

Engines fuse q, k, v and gate, up into one matrix with one per-tensor scale, and would round a second time if
the members' scales differed. So linears that share an input share their per-tensor weight scale and their
input scale, whatever method chooses the codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...base import parallel
from ...models.block import Block
from ...models.select import Layer
from ...numerics.clip import clip_range
from ...numerics.error import Histogram
from ...numerics.observers import Observer
from ...numerics.quantize import (
    TINY,
    Quantized,
    fake_quantize,
    outer_of,
    quantize,
    quantize_with,
    scale_type,
    scales_from_range,
    tile_range,
)
from ...numerics.scales import global_scale
from ...numerics.scheme import PER_TENSOR, Quant

Shared = Mapping[Quant, Tensor]  # what layers that share an input share of their scales
PROBE_VALUES = 1 << 16  # inputs kept per layer for the before/after histogram
GROUP = 32  # neighbours that are kept together, so that small groups of inputs can be rounded as they will be


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
            runs = values.flatten()[: values.numel() // GROUP * GROUP].view(-1, GROUP)[::step]
            self.values = torch.cat([self.values, runs.flatten()[: room // GROUP * GROUP].float().cpu()])

    def rescale(self, columns: Tensor) -> bool:
        """What was observed of all channels together does not tell what they are one by one."""
        return False

    def merge(self) -> None:
        """Take in the range that the other processes of the run have seen, and a part of the sample from each."""
        self.observer.merge()
        part = PROBE_VALUES // parallel.world() // GROUP * GROUP
        self.values = torch.cat(parallel.gathered(self.values[:part]))

    def scale(self, quant: Quant) -> Tensor:
        """Return the static scale ``[1, 1]`` in float32; of NVFP4 inputs it is the global one."""
        if quant.scale == "e4m3":
            return global_scale(torch.tensor([[self.observer.amax()]]), quant)
        return (torch.tensor([[self.observer.amax()]]) / quant.format.high).clamp(min=TINY)

    def histogram(self, quant: Quant, scale: Tensor) -> Histogram:
        """Return the sampled inputs before and after quantization."""
        sample = self.values.reshape((-1, GROUP) if quant.granularity.kind == "group" else (1, -1))
        return Histogram.of(sample, fake_quantize(sample, quant, scale))


def round_weight(
    weight: Tensor, quant: Quant, shared: Shared | None = None, hessian: Tensor | None = None
) -> Quantized:
    """Round one weight ``[out, in]``; below 8 bits scales take the weight's own type, as engines keep them.

    With a Hessian ``[in, in]`` each tile's range is clipped where that loses less of the output; scales that are
    shared stay what they are.
    """
    together = None if shared is None else shared.get(quant)
    if together is not None and quant.granularity == PER_TENSOR:
        return quantize_with(weight, together.clone(), None, quant)
    scale_dtype = scale_type(quant, weight.dtype)
    plain = quantize(weight, quant, scale_dtype, None if together is None else together.clone())
    if hessian is None:
        return plain
    scale, zero = clip_range(weight, quant, hessian, scale_dtype, plain.global_scale)
    return quantize_with(weight, scale, zero, quant, plain.global_scale)


def head_of(block: Block, layer: Layer) -> str:
    """Return the module path of the linear whose inputs stand for all of the layer's group."""
    assert layer.module is not None
    group = block.groups.get(layer.module)
    return group.linears[0] if group else layer.module


def by_group(block: Block) -> list[list[Layer]]:
    """Return the block's layers, those that share an input together."""
    groups: dict[object, list[Layer]] = {}
    for layer in block.layers:
        alone = _stacked_with(block, layer) if layer.module is None else layer.name
        groups.setdefault(block.groups.get(layer.module or "", alone), []).append(layer)
    return list(groups.values())


def _stacked_with(block: Block, layer: Layer) -> object:
    """Return what an expert's gate and up have in common where experts are no modules: the stack and the expert."""
    target = block.source.targets.get(layer.tensor)
    return (target.parameter, layer.name.rpartition(".")[0]) if target else layer.name


def shared_scale(block: Block, members: list[Layer]) -> Shared:
    """Return what covers all members with the same numbers, for each kind of numbers that at least two have.

    That is the scale ``[1, 1]`` of symmetric per-tensor weights, and the global one of NVFP4.
    """
    by_quant: dict[Quant, list[Layer]] = {}
    for layer in members:
        by_quant.setdefault(layer.scheme.weight, []).append(layer)
    shared = {}
    for quant, layers in by_quant.items():
        one_level = quant.granularity == PER_TENSOR and quant.symmetric
        if len(layers) < 2 or not (one_level or quant.scale == "e4m3"):
            continue
        ranges = [tile_range(block.weight(layer), PER_TENSOR) for layer in layers]
        low = torch.stack([low for low, _ in ranges]).amin(0)
        high = torch.stack([high for _, high in ranges]).amax(0)
        found = scales_from_range(low, high, quant)[0] if one_level else outer_of(low, high, quant)
        assert found is not None
        shared[quant] = found
    return shared
