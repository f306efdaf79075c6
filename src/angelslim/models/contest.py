"""Results that have to prove themselves: a layer's searched input scale beside the plain one that it must beat.

A method that searches input scales block by block cannot know what they do to the whole model. It hands in both: the
result as it likes it, and what plain rounding would have been, with the same codes. The run measures the two models on
the calibration samples when all blocks are done (`angelslim.trial`) and writes the better one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..numerics.error import Histogram
from .block import Block, QuantizedLayer


@dataclass(frozen=True)
class ContestedLayer(QuantizedLayer):
    """A result on trial; `plain` has the same weight and takes its place if the trial is lost."""

    plain: QuantizedLayer


def contest(block: Block, scale: Tensor, activations: Histogram | None, choice: str) -> None:
    """Put the result that was handed in last on trial against the plain input `scale` ``[1, 1]``."""
    given = block.results[-1]
    record = replace(given.record, input_scale=float(scale), activations=activations, choice=choice)
    plain = QuantizedLayer(given.layer, given.weight, scale, record)
    block.results[-1] = ContestedLayer(given.layer, given.weight, given.input_scale, given.record, plain)
