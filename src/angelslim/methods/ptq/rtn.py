"""Round to nearest: the baseline that every other algorithm has to beat.

Each weight goes to the closest code of its tile's grid, with scales from the tile's largest magnitude. Dynamic
activation scales need nothing more. Static ones are one number per layer, taken from the calibration inputs by
an observer (``absmax``, ``percentile`` or ``mse``).

With `mse_range` the range of each tile is clipped where that loses less of the layer's output (`numerics.clip`). That
needs the second moments of each input, so calibration data, and takes as long as running the model once. With
`signed_scales` symmetric integer scales are searched, negative ones too, for the least error of the weights: no data.

Engines fuse q, k, v and gate, up into one matrix with one per-tensor scale, and would round a second time if
the members' scales differed. So linears that share an input share their per-tensor weight scale and their
input scale here.

A layer that was published in the very numbers that are asked for, such as DeepSeek's FP8 tiles, keeps its codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...models.block import Block
from ...models.inputs import Makers
from ...models.select import Layer
from ...models.structure import Group
from ...numerics import refine
from ...numerics.clip import in_rows
from ...numerics.compensate import output_error
from ...numerics.moments import Moments
from ...numerics.observers import make_observer
from ...numerics.quantize import Quantized, quantize_with, scale_type
from ...numerics.scheme import Format, Quant, Scheme, format_named
from ._processes import round_together
from ._shared import InputStatistics, Shared, by_group, head_of, round_weight, shared_scale

SEARCHING = 6  # copies of a weight in float32 while its ranges are searched


class RoundToNearest:
    """Options: `observer`, `percentile` (static activations only); `mse_range`, whether ranges are clipped (no);
    `signed_scales`, whether symmetric integer scales are searched, and may be negative (no).
    """  # fmt: skip

    reads = frozenset({"observer", "percentile", "mse_range", "signed_scales"})
    follows_original = False
    keeps_function = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.clips = bool(options.get("mse_range", False))
        self.signed = bool(options.get("signed_scales", False))
        self.observer = str(options.get("observer", "absmax"))
        self.percent = float(options.get("percentile", 99.99))
        make_observer(self.observer, format_named("fp8_e4m3"), self.percent)  # an unknown name fails now

    def needs_data(self, scheme: Scheme) -> bool:
        """Static activation scales and clipping need data."""
        return scheme.needs_data or self.clips

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """Nothing beside the block; with clipping a Hessian for each input and what one layer's search holds."""
        if not self.clips:
            return 0
        paths = {layer.module: layer.shape[1] for layer in layers if layer.module is not None}
        held = {groups.get(path, path): 4 * width**2 for path, width in paths.items()}
        return sum(held.values()) + SEARCHING * 4 * max((x.shape[0] * x.shape[1] for x in layers), default=0)

    def statistics(self, block: Block) -> Makers:
        """Ranges of static inputs, moments where ranges of weights are clipped; one of each for a group."""
        makers: dict[tuple[str, type], Callable[[], Any]] = {}
        for layer in block.layers if block.samples else ():
            if layer.module is None:
                continue
            head, quant = head_of(block, layer), layer.scheme.input
            if quant is not None and quant.calibrated:
                makers.setdefault((head, InputStatistics), partial(self._range, quant.format))
            if self.clips:
                makers[head, Moments] = partial(Moments, layer.shape[1], block.device)
        return makers

    def _range(self, grid: Format) -> InputStatistics:
        return InputStatistics(make_observer(self.observer, grid, self.percent))

    def process(self, block: Block) -> None:
        """Round every layer; watch the inputs first where the scheme is static or ranges are clipped."""
        makers = self.statistics(block)
        block.expect(makers)
        for path, kind in makers:
            block.statistic(kind, path)  # while the block is as the samples shall see it
        if block.samples and not block.advanced:
            block.advance()
        round_together(block, by_group(block), lambda members: self._round_group(block, members, makers))

    def _round_group(self, block: Block, members: list[Layer], makers: Makers) -> None:
        shared = shared_scale(block, members)
        head = "" if members[0].module is None else head_of(block, members[0])
        squares = block.take(Moments, head).matrix if (head, Moments) in makers else None
        statistics = block.take(InputStatistics, head) if (head, InputStatistics) in makers else None
        for layer in members:
            weight = block.weight(layer)
            own = None if shared or squares is not None else block.published(layer)
            quantized = own or self._rounded(weight, layer.scheme.weight, shared, squares)
            error = None if squares is None else output_error(weight, quantized, squares)
            if statistics is None or layer.scheme.input is None or not layer.scheme.input.calibrated:
                block.emit(layer, weight, quantized, output_error=error)
                continue
            scale = statistics.scale(layer.scheme.input)
            histogram = statistics.histogram(layer.scheme.input, scale)
            block.emit(layer, weight, quantized, scale, histogram, output_error=error)

    def _rounded(self, weight: Tensor, quant: Quant, shared: Shared, squares: Tensor | None) -> Quantized:
        if not (self.signed and quant.symmetric and quant.format.kind == "int" and in_rows(weight, quant)):
            return round_weight(weight, quant, shared, squares)
        cost = torch.ones_like(weight[0], dtype=torch.float32) if squares is None else squares.diagonal()
        scale, zero = refine.searched(weight, quant, cost, scale_type(quant, weight.dtype), signed=True)
        return quantize_with(weight, scale, zero, quant)


METHOD = RoundToNearest
