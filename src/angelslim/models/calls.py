"""The arguments of blocks beside the hidden states, each equal one stored once.

Rotary tables and masks are the same for all samples of one length and for most blocks; kept for every sample and block
they would weigh more than the activations.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a block after the hidden states


class Interned:
    """Shares equal tensors between samples and blocks."""

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}

    def share(self, value: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """Return a value with every tensor in it replaced by the first equal one; `seen` is that of one sample."""
        if isinstance(value, Tensor):
            if id(value) not in seen:
                raw = value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
                digest = hashlib.sha1(raw, usedforsecurity=False).hexdigest()
                shared = self._known.setdefault(f"{value.shape}{value.dtype}{digest}", value)
                seen[id(value)] = (value, shared)  # holding the value keeps its id from being used again
            return seen[id(value)][1]
        if isinstance(value, tuple):
            return tuple(self.share(item, seen) for item in value)
        if isinstance(value, dict):
            return {key: self.share(item, seen) for key, item in value.items()}
        return value


def same(one: Any, other: Any) -> bool:
    """Say whether two calls have the same arguments; tensors were interned, so equal ones are one object."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)
