"""SmoothQuant as a transform: the inputs of each group of linears become easier to round, the weights a little harder.

The arithmetic is `numerics.smooth`, the folding `models.fold`. `alpha` is a number, 0.5 in the paper, or ``search``:
then every group gets the exponent that loses least of its own output under its own scheme, or no scale.

Linears behind a norm (q, k, v; gate and up) are smoothed as in the paper. Down and output projections follow where
their inputs can be rescaled through the rows of up_proj and v_proj: such rows have scales of their own, so it costs
the maker nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...base import parallel
from ...base.errors import ConfigError
from ...models import fold
from ...models.block import Block
from ...models.inputs import Makers
from ...models.select import Layer
from ...models.structure import Group
from ...numerics.scheme import Scheme
from ...numerics.smooth import Reader, search, smooth_scale
from ._shared import Place, Places, scale_dtype

SAMPLED = 256  # tokens of a group's input that the search looks at: its rows say more than further tokens
SEARCH = "search"


class Range:
    """The largest magnitude of each input channel ``[in]``, and a sample of tokens ``[tokens, in]``."""

    def __init__(self, width: int, each: int, device: torch.device) -> None:
        self.amax = torch.zeros(width, device=device)
        self._each = each  # tokens kept of one sample
        self._kept = [torch.zeros(0, width, device=device)]

    def update(self, inputs: Tensor) -> None:
        """Take in one sample's inputs ``[tokens, in]``."""
        self.amax = torch.maximum(self.amax, inputs.abs().amax(0).float()) if len(inputs) else self.amax
        if self._each and len(inputs):
            self._kept.append(inputs[:: -(-len(inputs) // self._each)].float())

    def merge(self) -> None:
        """Take in what the other processes of the run have seen."""
        self.amax = parallel.highest(self.amax)
        if self._each:
            self._kept = parallel.gathered(self.tokens)

    def rescale(self, columns: Tensor) -> bool:
        """Divide the inputs by `columns` ``[in]``."""
        self.amax = self.amax / columns
        self._kept = [each / columns for each in self._kept]
        return True

    @property
    def tokens(self) -> Tensor:
        """The sample."""
        return torch.cat(self._kept)


class Smooth:
    """Option: `alpha`, a number from 0 to 1 or ``search``."""

    reads = frozenset({"alpha"})
    follows_original = False
    keeps_function = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        given = options.get("alpha", 0.5)
        self.alpha = None if given == SEARCH else float(given)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}.", fix="Use a number from 0 to 1, or search.")
        self.places = Places("smoothing")

    def needs_data(self, scheme: Scheme) -> bool:
        """Ranges of the inputs come from calibration."""
        return True

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """Exact weights, a sample of each group's inputs, and what the search holds for the largest of them."""
        exact = sum(4 * x.shape[0] * x.shape[1] for x in layers if x.scheme.weight.format.bits >= 8)
        widths = [layer.shape[1] for layer in layers]
        outputs = 2 * 4 * SAMPLED * sum(layer.shape[0] for layer in layers)
        rounded = 4 * 4 * max((layer.shape[0] * layer.shape[1] for layer in layers), default=0)
        return exact + 4 * SAMPLED * sum(widths) + (outputs + rounded if self.alpha is None else 0)

    def statistics(self, block: Block) -> Makers:
        """The range of each group's inputs that can be smoothed."""
        each = 0 if self.alpha is not None else -(-SAMPLED // max(parallel.total_count(block.samples), 1))
        return {
            (place.head, Range): partial(Range, place.fold.width, each, block.device)
            for place in self.places.of(block)
        }

    def process(self, block: Block) -> None:
        """Smooth every group of the block that can be."""
        block.expect(self.statistics(block))
        for place in self.places.of(block):
            scale = self._scale(block, place, block.take(Range, place.head))
            done = None if scale is None else fold.apply(block, place.fold, scale)
            if isinstance(done, str):
                self.places.say(place.fold.group, done)

    def _scale(self, block: Block, place: Place, seen: Range) -> Tensor | None:
        """Return the scale ``[in]`` of a group's inputs, or None."""
        amax = place.fold.shared(seen.amax, "amax")
        largest = torch.zeros_like(amax)
        readers = []
        for layer, weight in self._weights(block, place):
            largest = torch.maximum(largest, weight.abs().amax(0).float())
            if self.alpha is None:
                readers.append(Reader(weight, layer.scheme, scale_dtype(layer, weight)))
        largest = place.fold.shared(largest, "amax")
        if self.alpha is not None:
            return smooth_scale(amax, largest, self.alpha)
        best = search(seen.tokens, amax, largest, readers)
        return None if best.alpha is None else best.scale

    def _weights(self, block: Block, place: Place) -> Iterator[tuple[Layer, Tensor]]:
        for layer in place.layers:
            yield layer, block.weight(layer)
        yield from place.expert_weights(block, every=self.alpha is not None)


METHOD = Smooth
