"""What choosing scales needs to know of a layer's inputs: second moments, with loud tokens turned down.

The error of a rounded layer on its inputs ``X [tokens, in]`` is ``Tr(E H E^T)`` with ``H = X^T X / tokens``. In language
models a few tokens, mostly the first, have activations that are hundreds of times larger than the others' in some
layers. Squared they are all of H, and a scale chosen by it serves these tokens alone; yet the next norm divides each
token by its own size, so what matters is the error *relative* to it. Here a token that is more than `LOUD` times as
large as the median of its sample is therefore scaled down to that size before it is counted. Layers behind a norm
have no such tokens, and their H is the plain one.

This is for choosing among scales and clipping ranges. Rounding that is compensated column by column solves for one H,
and gains nothing from turning tokens down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import parallel
from .products import Squares

LOUD = 2.0  # times the median size


class Moments:
    """Sums over tokens in float32: ``x^T x`` and ``|x|``, of tokens of at most `LOUD` times the median size."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.tokens = 0
        self._squares = Squares(width, device)
        self._magnitudes = torch.zeros(width, device=device)

    def update(self, inputs: Tensor) -> None:
        """Take in one sample's inputs ``[tokens, in]``."""
        if not len(inputs):
            return
        size = torch.linalg.vector_norm(inputs, dim=1, keepdim=True, dtype=torch.float32)
        limit = LOUD * size.median()
        loud = size > limit
        self.tokens += len(inputs)
        if loud.any():  # few, and by themselves: the others stay numbers of their own type
            rows = loud.squeeze(1)
            self._add(inputs[rows].float() * (limit / size[rows]))
            inputs = inputs.masked_fill(
                loud, 0
            )  # of one shape whatever their number: CPU code is made for shapes
        self._add(inputs)

    def _add(self, inputs: Tensor) -> None:
        self._squares.add(inputs)
        self._magnitudes += inputs.abs().sum(0, dtype=torch.float32)

    def rescale(self, columns: Tensor) -> bool:
        """Divide the inputs by `columns` ``[in]``; loud tokens stay those that were loud before."""
        self._squares.rescale(columns)
        self._magnitudes /= columns
        return True

    def merge(self) -> None:
        """Add what the other processes of the run have seen; each has turned down the loud ones of its own samples."""
        self.tokens = parallel.total_count(self.tokens)
        self._squares.merge()
        self._magnitudes = parallel.total(self._magnitudes)

    @property
    def matrix(self) -> Tensor:
        """H ``[in, in]``, the mean over tokens."""
        return self._squares.whole() / max(self.tokens, 1)

    @property
    def mean(self) -> Tensor:
        """The mean magnitude of each channel ``[in]``."""
        return self._magnitudes / max(self.tokens, 1)
