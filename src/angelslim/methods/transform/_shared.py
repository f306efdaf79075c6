"""What transforms that rescale channels share: where a block allows it, and who reads the rescaled inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.console import chose
from ...models.block import Block
from ...models.experts import streamable
from ...models.fold import Fold
from ...models.refold import Folds
from ...models.select import Layer
from ...models.structure import Group

TIED = "its maker's rows share a scale, and rescaling them would cost the maker"
JUDGED = (
    8  # streamed experts of a layer that a scale is judged by; reading all of them once more would take long
)


@dataclass(frozen=True, eq=False)
class Place:
    """A folding, and the layers that read its inputs and will be rounded."""

    fold: Fold
    layers: tuple[Layer, ...]
    experts: tuple[Layer, ...] = ()  # of streamed experts; they are not in memory

    @property
    def head(self) -> str:
        """The module whose inputs stand for all of the group."""
        return (self.fold.group.linears or self.fold.group.others)[0]

    def expert_weights(self, block: Block, every: bool) -> Iterator[tuple[Layer, Tensor]]:
        """Read the streamed experts' weights ``[out, in]`` as they are now: of `JUDGED` experts, or of every one."""
        step = 1 if every else (len(self.experts) // (2 * JUDGED)) | 1  # odd: gates and ups alternate
        scales = [block.expert_scales[path] for path in self.fold.group.others if path in block.expert_scales]
        for layer in self.experts[::step]:
            weight = block.source.checkpoint.read(layer.tensor, block.device).to(block.source.dtype)
            for scale in scales:
                weight = (weight * scale.to(weight.device)).to(weight.dtype)
            yield layer, weight


class Places:
    """Finds the places of block after block; says why a group has none, once for each kind of group."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._said: set[tuple[str, str]] = set()
        self._folds = Folds()
        self._last: tuple[Block, list[Place]] | None = None

    def of(self, block: Block) -> list[Place]:
        """Return the places of a block; those of the last one are remembered."""
        if self._last is None or self._last[0] is not block:
            self._last = block, self._found(block)
        return self._last[1]

    def _found(self, block: Block) -> list[Place]:
        found = []
        readers = _readers(block)
        for group, place in self._folds.find_all(block, list(readers)).items():
            layers, experts = readers[group]
            reason = place if isinstance(place, str) else _refusal(block, place)
            if isinstance(place, Fold) and not reason:
                found.append(Place(place, tuple(layers), tuple(experts)))
            else:
                self.say(group, reason)
        return found

    def say(self, group: Group, reason: str) -> None:
        """Log once why a kind of group is left alone."""
        name = (group.linears or group.others)[0].rpartition(".")[2]
        if (name, reason) not in self._said:
            self._said.add((name, reason))
            chose(f"no {self.what} of {name}'s inputs", reason)


def _readers(block: Block) -> dict[Group, tuple[list[Layer], list[Layer]]]:
    """Return the groups whose readers will be rounded: layers of the block, and of its streamed experts."""
    found: dict[Group, tuple[list[Layer], list[Layer]]] = {}
    for layer in block.layers:
        group = block.groups.get(layer.module or "")
        if group is not None:
            found.setdefault(group, ([], []))[0].append(layer)
    if not block.streamed or block.index is None:
        return found
    path = block.source.structure.blocks[block.index]
    for stack, experts in streamable(block.source, path).items():
        group = next((each for each in block.source.structure.groups[path] if stack in each.others), None)
        first = {name for tensors in experts for name in tensors.first}
        if group is not None:
            layers = [layer for layer in block.streamed if layer.tensor in first]
            found.setdefault(group, ([], []))[1].extend(layers)
    return found


def _refusal(block: Block, found: Fold) -> str:
    maker = next((layer for layer in block.layers if layer.module == found.maker), None)
    tied = maker is not None and maker.scheme.weight.granularity.kind in ("tensor", "block")
    return TIED if tied else ""


def scale_dtype(layer: Layer, weight: Tensor) -> torch.dtype:
    """Return the type in which rounding will store the layer's scales (that of `methods.ptq`)."""
    return weight.dtype if layer.scheme.weight.format.bits < 8 else torch.float32
