"""What a block shall give: the original's outputs on the calibration samples, for methods that train towards them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...models.block import Block, ObservePair


def outputs_of(block: Block, watched: Mapping[str, ObservePair]) -> list[Tensor]:
    """Watch the linears, and return what the block shall give for each sample, in the model's own type."""
    path = None if block.index is None else block.source.structure.blocks[block.index]
    if path is None or block.module is not block.source.model.get_submodule(path):
        # A tower, or an expert: the tokens that it was sent, its own output.
        block.compare(watched)
        with torch.no_grad():
            return [block.forward([index]).cpu() for index in range(block.samples)]
    seen: list[Tensor] = []
    handle = block.module.register_forward_hook(partial(_keep, seen))
    try:
        block.compare(watched)  # each sample runs twice: from its own inputs, then from the original's
    finally:
        handle.remove()
    return seen[1::2]


def _keep(seen: list[Tensor], _module: Any, _args: Any, output: Any) -> None:
    """Keep the original's outputs, every second one; of the others only their place."""
    hidden = output[0] if isinstance(output, tuple) else output
    seen.append(hidden.cpu() if len(seen) % 2 else torch.empty(0))


def of_one_length(chosen: Sequence[int], aims: Sequence[Tensor]) -> list[list[int]]:
    """Return the chosen samples, those of one length together."""
    groups: dict[torch.Size, list[int]] = {}
    for index in chosen:
        groups.setdefault(aims[index].shape, []).append(index)
    return list(groups.values())
