"""Static scales of a quantized key-value cache, and what the cache then returns.

Keys and values ``[batch, heads, tokens, head_dim]`` are stored as FP8 codes with scales that are fixed beforehand:
one for all heads of a layer (``[1]``), or one for each head (``[heads, 1, 1]``). The scale maps the largest magnitude
seen in calibration to the largest code; a cache grows token by token, so what comes later and is larger saturates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import parallel
from .quantize import round_to, scales_from_range
from .scheme import Quant


class HeadRanges:
    """The largest magnitude seen in each head ``[heads]`` float32."""

    def __init__(self) -> None:
        self.amax = torch.zeros(0)

    def update(self, states: Tensor) -> None:
        """Take in queries, keys or values ``[batch, heads, tokens, head_dim]``."""
        low, high = torch.aminmax(states.detach().transpose(0, 1).flatten(1), dim=1)
        amax = torch.maximum(-low, high).float()
        self.amax = torch.maximum(self.amax, amax) if self.amax.numel() else amax

    def merge(self) -> None:
        """Take in what the other processes of the run have seen; this one may have seen nothing."""
        heads = parallel.highest(torch.tensor(self.amax.numel())).item()
        seen = self.amax.cpu() if self.amax.numel() else torch.zeros(int(heads))
        self.amax = parallel.highest(seen)

    def scale(self, quant: Quant) -> Tensor:
        """Return the static scale ``[1]`` or ``[heads, 1, 1]`` in float32; heads that stayed zero get the scale 1."""
        amax = self.amax.reshape(-1, 1, 1) if quant.granularity.kind == "head" else self.amax.max().reshape(1)
        return scales_from_range(-amax, amax, quant)[0]


def through_cache(states: Tensor, scale: Tensor, quant: Quant) -> Tensor:
    """Return ``states [batch, heads, tokens, head_dim]`` as they come back from the cache, in their own type."""
    codes = round_to(states.float() / scale, quant.format)
    return (codes.float() * scale).to(states.dtype)
