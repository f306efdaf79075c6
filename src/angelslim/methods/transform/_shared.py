"""What transforms that rescale channels share: where a block allows it, and how its readers will be rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...base.console import chose
from ...models import fold
from ...models.block import Block
from ...models.fold import Fold
from ...models.select import Layer
from ...models.structure import Group
from ...numerics.quantize import scale_type

TIED = "its maker's rows share a scale, and rescaling them would cost the maker"


@dataclass(frozen=True, eq=False)
class Place:
    """A folding, and the layers that read its inputs and will be rounded."""

    fold: Fold
    layers: tuple[Layer, ...]

    @property
    def head(self) -> str:
        """The module whose inputs stand for all of the group."""
        return self.fold.group.linears[0]


class Places:
    """Finds the places of block after block; says why a group has none, once for each kind of group."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._said: set[tuple[str, str]] = set()

    def of(self, block: Block) -> list[Place]:
        """Return the places of a block, in the order in which its groups run."""
        readers: dict[Group, list[Layer]] = {}
        for layer in block.layers:
            group = block.groups.get(layer.module or "")
            if group is not None:
                readers.setdefault(group, []).append(layer)
        found = []
        for group, layers in readers.items():
            place = fold.find(block, group)
            reason = place if isinstance(place, str) else _refusal(block, place)
            if isinstance(place, Fold) and not reason:
                found.append(Place(place, tuple(layers)))
            else:
                self.say(group, reason)
        return found

    def say(self, group: Group, reason: str) -> None:
        """Log once why a kind of group is left alone."""
        name = group.linears[0].rpartition(".")[2]
        if (name, reason) not in self._said:
            self._said.add((name, reason))
            chose(f"no {self.what} of {name}'s inputs", reason)


def _refusal(block: Block, found: Fold) -> str:
    maker = next((layer for layer in block.layers if layer.module == found.maker), None)
    tied = maker is not None and maker.scheme.weight.granularity.kind in ("tensor", "block")
    return TIED if tied else ""


def scale_dtype(layer: Layer, weight: torch.Tensor) -> torch.dtype:
    """Return the type in which rounding will store the layer's scales (that of `methods.ptq`)."""
    return scale_type(layer.scheme.weight, weight.dtype)
