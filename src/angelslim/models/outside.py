"""What lies outside the decoder blocks, in memory while the model runs without them.

Embeddings, norms and the head are read when they are first called; towers whole, because some of their parameters are
used without a call (tables of positions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .loading import Source

TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids"})  # everything else is for a tower


@contextmanager
def filled_on_demand(source: Source, device: torch.device) -> Iterator[None]:
    """Let modules outside the blocks read their weights when first called (the embedding, mostly)."""
    handles = []
    for name, module in source.model.named_modules():
        outside = source.structure.block_of(name) is None and name not in source.structure.blocks
        if outside and any(value.is_meta for value in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(_filler(source, name, device)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _filler(source: Source, name: str, device: torch.device) -> Callable[..., None]:
    def fill(_module: nn.Module, _args: Any) -> None:
        source.materialize(name, device)

    return fill


@contextmanager
def before_blocks(source: Source, device: torch.device, *, towers: bool) -> Iterator[None]:
    """Hold what runs before the first block. It stays when the context ends: `Source.free` gives it back."""
    # Some models look where its weight lies before they call it.
    embedding = source.model.get_input_embeddings()
    for name in source.structure.embeddings:
        if source.model.get_submodule(name) is embedding:
            source.materialize(name, device)
    with filled_on_demand(source, device):
        for tower in source.structure.towers.values() if towers else ():
            source.materialize(tower, device)
        yield


def before_blocks_bytes(source: Source) -> int:
    """Return the bytes of the towers and the embeddings, as the checkpoint has them."""
    paths = (*source.structure.towers.values(), *source.structure.embeddings)
    targets = source.targets
    return sum(
        info.nbytes
        for name, info in source.checkpoint.tensors.items()
        if name in targets and targets[name].parameter.startswith(paths)
    )
