"""Round to nearest: the baseline that every other algorithm has to beat.

Each weight goes to the closest code of its tile's grid, with scales from the tile's largest magnitude. Dynamic
activation scales need nothing more. Static ones are one number per layer, taken from the calibration inputs by
an observer (``absmax``, ``percentile`` or ``mse``).

Engines fuse q, k, v and gate, up into one matrix with one per-tensor scale, and would round a second time if
the members' scales differed. So linears that share an input share their per-tensor weight scale and their
input scale here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...models.select import Layer
from ...models.structure import Group
from ...models.walk import Block
from ...numerics.observers import make_observer
from ...numerics.scheme import Scheme, format_named
from ._shared import InputStatistics, by_group, head_of, round_weight, shared_scale


class RoundToNearest:
    """Options: `observer`, `percentile` (static activations only)."""

    reads = frozenset({"observer", "percentile"})
    follows_original = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.observer = str(options.get("observer", "absmax"))
        self.percent = float(options.get("percentile", 99.99))
        make_observer(self.observer, format_named("fp8_e4m3"), self.percent)  # an unknown name fails now

    def needs_data(self, scheme: Scheme) -> bool:
        """Only static activation scales need data."""
        return scheme.needs_data

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """Nothing beside the block."""
        return 0

    def process(self, block: Block) -> None:
        """Round every layer; observe inputs first where the scheme is static."""
        inputs = self._observe(block) if block.samples else {}
        for members in by_group(block):
            self._round_group(block, members, inputs)

    def _observe(self, block: Block) -> dict[str, InputStatistics]:
        """Run the samples through the unquantized block, watching each group's input once."""
        watched: dict[str, InputStatistics] = {}
        heads: dict[str, InputStatistics] = {}
        for layer in block.layers:
            assert layer.module is not None and layer.scheme.input is not None
            head = head_of(block, layer)
            if head not in heads:
                heads[head] = InputStatistics(
                    make_observer(self.observer, layer.scheme.input.format, self.percent)
                )
            watched[layer.module] = heads[head]
        block.advance({path: statistics.update for path, statistics in heads.items()})
        return watched

    def _round_group(self, block: Block, members: list[Layer], inputs: dict[str, InputStatistics]) -> None:
        shared = shared_scale(block, members)
        for layer in members:
            weight = block.weight(layer)
            quantized = round_weight(weight, layer.scheme.weight, shared)
            statistics = inputs.get(layer.module or "")
            if statistics is None or layer.scheme.input is None:
                block.emit(layer, weight, quantized)
                continue
            scale = statistics.scale(layer.scheme.input)
            block.emit(layer, weight, quantized, scale, statistics.histogram(layer.scheme.input, scale))


METHOD = RoundToNearest
