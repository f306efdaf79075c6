"""AWQ as a transform: the channels that matter most get finer steps, whatever rounding follows.

For each group of linears whose inputs can be rescaled (`models.fold`), `numerics.awq` ranks scales by what the rounded
linears lose of their outputs. The best ones are then tried in the block itself, on a few samples: what the whole
block loses decides, since a query and a value, or a wide and a narrow layer, do not weigh the same in it. A token's
error counts as a share of the token's size, as it does for the norm of the next block. No scale at all takes part in
both rounds and wins ties.

Streamed experts are one group with the router and the shared expert behind the same norm; a few of them are read to
judge the scale, which is then theirs and the router's alike. Each expert's down projection is rescaled by itself, by
the tokens that were sent there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...base import parallel
from ...models import fold
from ...models.block import Block
from ...models.inputs import Makers
from ...models.select import Layer
from ...models.structure import Group
from ...numerics.awq import Candidate, Reader, column_share, search
from ...numerics.moments import Moments
from ...numerics.scheme import Scheme
from ._shared import Place, Places, scale_dtype

TRIED = 3  # of the best scales, in the block
TOKENS = 2048  # of calibration samples drawn at random that the block is tried on, at least


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
        found = self.places.of(block)
        block.expect(self.statistics(block))
        exact = _drawn(block) if found else {}
        for place in found:
            self._rescale(block, place, block.statistic(Moments, place.head), exact)

    def _rescale(self, block: Block, place: Place, seen: Moments, exact: Mapping[int, Tensor]) -> None:
        readers = {}
        for layer in place.layers:
            weight = block.weight(layer)
            readers[f"{layer.module}.weight"] = Reader(
                weight, layer.scheme.weight, scale_dtype(layer, weight)
            )
        experts = [
            Reader(weight, layer.scheme.weight, scale_dtype(layer, weight)).sampled()
            for layer, weight in place.expert_weights(block, every=False)
        ]
        mean = place.fold.shared(seen.mean, "mean")
        share = place.fold.shared(column_share([*readers.values(), *experts]), "mean")
        ranked = search([*readers.values(), *experts], mean, share, seen.matrix, duo=self.duo)
        # Streamed experts answer nothing while the block is tried, so there the ranking decides.
        best = ranked[0] if experts else self._best(block, readers, ranked, exact)
        if not best.plain:
            done = fold.apply(block, place.fold, best.scale)
            if isinstance(done, str):
                self.places.say(place.fold.group, done)

    def _best(
        self,
        block: Block,
        readers: Mapping[str, Reader],
        ranked: Sequence[Candidate],
        exact: Mapping[int, Tensor],
    ) -> Candidate:
        """Return the scale with which the block as a whole loses least."""
        plain = next(each for each in ranked if each.plain)
        better = ranked[: ranked.index(plain)][:TRIED]
        if not better:
            return plain
        losses = {}
        for each in (plain, *better):
            values = {path: reader.rounded(each.scale) for path, reader in readers.items()}
            with fold.with_values(block, values), torch.no_grad():
                lost = sum(_lost(block.forward([sample]), output) for sample, output in exact.items())
            losses[each] = float(parallel.total(torch.tensor(lost, dtype=torch.float64)))
        return min(losses, key=lambda each: losses[each])


def _drawn(block: Block) -> dict[int, Tensor]:
    """Return samples drawn at random, each process its part of them, and the block's outputs for them."""
    order = torch.randperm(block.samples, generator=torch.Generator().manual_seed(0)).tolist()
    exact: dict[int, Tensor] = {}
    tokens = 0
    for sample in order:
        if tokens * parallel.world() < TOKENS:
            with torch.no_grad():
                exact[sample] = block.forward([sample])
            tokens += exact[sample].shape[:-1].numel()
    return exact


def _lost(now: Tensor, then: Tensor) -> float:
    """Return the sum over tokens of the squared error as a share of the token's own size: norms follow."""
    error = (now.float() - then.float()).square().sum(-1)
    return (error / then.float().square().sum(-1).clamp(min=1e-30)).sum().item()


METHOD = AWQ
