"""Absmean (BitNet b1.58, arXiv 2402.17764): ternary weights, scaled by their mean magnitude.

Weights of at least half the mean magnitude become their sign, the others zero. One scale for the whole tensor, as in
the paper. With groups this is exactly Tequila without its bias, the baseline to compare that with.

The paper's layers also read eight-bit inputs; `activations: int8` trains with them (`_activations`). What is merged are
the weights alone: an engine rounds the inputs, or does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ...numerics.scheme import PER_TENSOR
from ._activations import round_inputs
from ._fixed import TernaryByRule
from ._options import choice
from ._quantizer import COMMON


class AbsMean(TernaryByRule):
    """Options: `activations` (none or int8), and those of every quantizer; one scale for the tensor by default."""

    reads = COMMON | {"activations"}
    rule = "absmean"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options, PER_TENSOR)
        self.rounds = choice(options, "activations", "none", ("none", "int8")) == "int8"
        self.handle: RemovableHandle | None = None

    def join(self, linear: nn.Linear) -> None:
        """Round the layer's inputs, where that is asked for."""
        if self.rounds:
            self.handle = round_inputs(linear, self.compiling)

    def leave(self, linear: nn.Linear) -> None:
        """Read the inputs as they are again."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


QUANTIZER = AbsMean
