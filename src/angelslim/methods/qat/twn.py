"""TWN (arXiv 1605.04711): ternary weights with the threshold and scale that suit a bell-shaped tile.

The threshold is 0.75 of the mean magnitude; the scale is the mean magnitude of the weights that pass it, which loses
least of the weight for that threshold.
"""

from __future__ import annotations

from ._fixed import TernaryByRule


class TernaryWeights(TernaryByRule):
    """Options: those of every quantizer; one scale a channel by default."""

    rule = "twn"


QUANTIZER = TernaryWeights
