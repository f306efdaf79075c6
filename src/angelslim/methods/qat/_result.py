"""Hand in weights that training has quantized already: the last step of such a run, a method like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...models.block import Block
from ...models.inputs import Makers
from ...models.select import Layer
from ...models.structure import Group
from ...numerics.quantize import Quantized
from ...numerics.scheme import Scheme


class Trained:
    """Emits `layers` (module path -> codes and scales); `notes` say what a reader has to know of a layer."""

    reads: frozenset[str] = frozenset()
    follows_original = False
    keeps_function = True
    merges = True

    def __init__(self, layers: Mapping[str, Quantized], notes: Mapping[str, str]) -> None:
        self.layers, self.notes = layers, notes

    def needs_data(self, scheme: Scheme) -> bool:
        """Training has seen the data."""
        return False

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """Nothing beside the results."""
        return 0

    def statistics(self, block: Block) -> Makers:
        """None."""
        return {}

    def process(self, block: Block) -> None:
        """Hand in every layer of the block."""
        for layer in block.layers:
            module = str(layer.module)
            block.emit(layer, block.weight(layer), self.layers[module], note=self.notes.get(module, ""))
