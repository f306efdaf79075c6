"""AWQ as a transform: the channels that matter most get finer steps, whatever rounding follows.

For each group of linears whose inputs can be rescaled (`models.fold`), `numerics.awq` ranks scales by what the rounded
linears lose of their outputs, and the best one is folded in; no scale at all takes part and wins ties. The paper runs
the block for each candidate. Trying the three best ones in the whole block took about as long as all of the rest; on two
small models and two to three seeds the divergence moved by a percent at most, in either direction.

Streamed experts are one group with the router and the shared expert behind the same norm; a few of them are read to
judge the scale, which is then theirs and the router's alike. Each expert's down projection is rescaled by itself, by
the tokens that were sent there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ...models import fold
from ...models.block import Block
from ...models.inputs import Makers
from ...models.select import Layer
from ...models.structure import Group
from ...numerics.awq import Reader, column_share, search
from ...numerics.moments import Moments
from ...numerics.scheme import Scheme
from ._shared import Place, Places, scale_dtype


class AWQ:
    """Option: `duo`, whether scales that also look at the weights are tried (yes)."""

    reads = frozenset({"duo"})
    follows_original = False
    keeps_function = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.duo = bool(options.get("duo", True))
        self.places = Places("rescaling")

    def needs_data(self, scheme: Scheme) -> bool:
        """Magnitudes and Hessians come from calibration."""
        return True

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """A Hessian for each input of the block, and four copies of the largest weight in float32."""
        paths = {layer.module: layer.shape[1] for layer in layers if layer.module is not None}
        held = {groups.get(path, path): 4 * width**2 for path, width in paths.items()}
        return sum(held.values()) + 16 * max((x.shape[0] * x.shape[1] for x in layers), default=0)

    def statistics(self, block: Block) -> Makers:
        """The moments of each group's inputs that can be rescaled."""
        return {
            (place.head, Moments): partial(Moments, place.fold.width, block.device)
            for place in self.places.of(block)
        }

    def process(self, block: Block) -> None:
        """Rescale every group of the block that gains from it."""
        block.expect(self.statistics(block))
        for place in self.places.of(block):
            self._rescale(block, place, block.statistic(Moments, place.head))

    def _rescale(self, block: Block, place: Place, seen: Moments) -> None:
        weights = [(layer, block.weight(layer)) for layer in place.layers]
        readers = [
            Reader(weight, layer.scheme.weight, scale_dtype(layer, weight))
            for layer, weight in (*weights, *place.expert_weights(block, every=False))
        ]
        mean = place.fold.shared(seen.mean, "mean")
        share = place.fold.shared(column_share(readers), "mean")
        best = search([reader.sampled() for reader in readers], mean, share, seen.matrix, duo=self.duo)[0]
        if not best.plain:
            done = fold.apply(block, place.fold, best.scale)
            if isinstance(done, str):
                self.places.say(place.fold.group, done)


METHOD = AWQ
