"""Thresholds and scales of ternary weights, computed from the weights alone.

A tile of weights w becomes ``scale * t``, with t = sign(w) where ``|w| >= threshold`` and 0 elsewhere.

=========  ==================  ===================================  ==========================================
rule       threshold           scale                                source
=========  ==================  ===================================  ==========================================
absmean    mean ``|w|`` / 2    mean ``|w|`` over all weights        BitNet b1.58, arXiv 2402.17764
twn        0.75 mean ``|w|``   mean ``|w|`` over the kept weights   ternary weight networks, arXiv 1605.04711
minmax     max ``|w|`` / 2     max ``|w|``                          the symmetric grid of LLM-QAT, 2305.17888
=========  ==================  ===================================  ==========================================

BitNet's code rounds ``w / scale`` half to even, which differs from the threshold only where ``|w|`` is exactly half the
scale. Min-max leaves nearly all weights of a bell-shaped tile at zero; it is the baseline that the others are to beat.

Tiles are ``[down, across, size]``, thresholds and scales ``[down, across, 1]``, all float32. A tile of zeros has the
scale 0 and the codes 0.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

TWN_SHARE = 0.75


def absmean(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return (threshold, scale) of BitNet b1.58."""
    scale = tiles.abs().mean(-1, keepdim=True)
    return scale / 2, scale


def twn(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return (threshold, scale) of ternary weight networks."""
    size = tiles.abs()
    threshold = TWN_SHARE * size.mean(-1, keepdim=True)
    large = size >= threshold
    return threshold, (size * large).sum(-1, keepdim=True) / large.sum(-1, keepdim=True).clamp(min=1)


def minmax(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return (threshold, scale) of the grid that covers the largest weight."""
    scale = tiles.abs().amax(-1, keepdim=True)
    return scale / 2, scale


RULES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "absmean": absmean,
    "twn": twn,
    "minmax": minmax,
}


def ternary_codes(tiles: Tensor, threshold: Tensor) -> Tensor:
    """Return -1, 0, 1 in the type of `tiles`; a weight of zero stays zero, whatever the threshold.

    >>> import torch
    >>> ternary_codes(torch.tensor([[[-3.0, 0.0, 1.0, 2.0]]]), torch.tensor([[[1.5]]]))
    tensor([[[-1., 0., 0., 1.]]])
    """
    return (tiles >= threshold).to(tiles.dtype).sub_((tiles <= -threshold).to(tiles.dtype))


def dead_zone(tiles: Tensor, threshold: Tensor) -> Tensor:
    """Say which weights ternary codes turn into zeros."""
    return tiles.abs() < threshold
