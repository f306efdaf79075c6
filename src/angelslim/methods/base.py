"""What a method is. There are three kinds, and nothing else:

* **Blockwise** gets one decoder block at a time with its calibration inputs and hands in quantized layers
  (post-training quantization), or changes the block first in a way that rounding likes better (transforms).
* **Trained** gives a loss to the one training loop (quantization-aware training, distillation, drafts).
* **Attached** puts removable hooks on a loaded model (sparse attention, token pruning).

A module in ``methods/ptq/`` or ``methods/transform/`` defines ``METHOD``, a class with the `Blockwise` protocol; its
file name is the name that recipes use. A module in ``methods/rewrite/`` defines ``METHOD`` with the `Rewrite`
protocol: it changes the whole checkpoint while it is read, without data. A module in ``methods/qat/`` defines
``QUANTIZER``, a class made from options: what a layer's weight is rounded to while it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..base.errors import ConfigError, did_you_mean
from ..base.registry import Registry
from ..models.block import Block
from ..models.inputs import Makers
from ..models.loading import Source
from ..models.select import Layer
from ..models.structure import Group
from ..numerics.scheme import Scheme
from .qat._quantizer import Quantizer


class Blockwise(Protocol):
    """Works on the layers of one block after another.

    The engine calls `process` once for each block in order, and for the layers outside the blocks; where experts
    are streamed, for each expert too. With calibration data, `block.advance` runs the samples through the block;
    the engine calls it if `process` has not. A method whose next block shall see what its rounding did calls
    `block.collect` to watch the original block, `block.replace` for each weight, then `block.advance`.

    Sums over a linear's inputs that a stage needs are named by `statistics` before any stage begins, and collected in
    one run of the samples for all of them (`models.inputs`); `block.statistic` returns them.

    Processes that torchrun started hold different samples (`base.parallel`): statistics are merged and errors summed
    before anything is decided by them, and every process makes the same calls.

    A transform runs before the rounding method, is called only for blocks with samples, changes weights with
    `block.rewrite`, and neither emits nor advances.
    """

    reads: frozenset[str]  # the options it knows; others that a recipe sets are reported as having no effect
    follows_original: (
        bool  # calls `block.compare`, so the original model's activations are kept beside its own
    )

    keeps_function: (
        bool  # leaves the block's outputs as they are, so the next block does not see what rounding did
    )

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Take the method's options from the recipe; wrong values are a `ConfigError`."""

    def needs_data(self, scheme: Scheme) -> bool:
        """Say whether calibration samples are needed; without them the model never runs."""

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """Estimate the bytes that `process` holds for these layers of a block, beside the block and its results."""

    def statistics(self, block: Block) -> Makers:
        """Name the statistics that `process` will ask the block for with `block.statistic` or `take`; maybe none."""

    def process(self, block: Block) -> None:
        """Quantize every layer of `block` and hand each in with `block.emit`; a transform changes them instead."""


class Rewrite(Protocol):
    """Changes a model's weights as they are read, leaving its function as it was."""

    reads: frozenset[str]

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Take the options from the recipe; wrong values are a `ConfigError`."""

    def rewrite(self, source: Source) -> Source:
        """Return a source whose tensors are the changed ones; refuse a model that it cannot change."""


PTQ: Registry[type[Blockwise]] = Registry("method", "angelslim.methods.ptq", "METHOD")
TRANSFORMS: Registry[type[Blockwise]] = Registry("transform", "angelslim.methods.transform", "METHOD")
REWRITES: Registry[type[Rewrite]] = Registry("rewrite", "angelslim.methods.rewrite", "METHOD")
QAT: Registry[type[Quantizer]] = Registry("quantizer", "angelslim.methods.qat", "QUANTIZER")


def make_quantizer(name: str, options: Mapping[str, Any]) -> Quantizer:
    """Return a quantizer with its options; an unknown name or option is a `ConfigError`."""
    made = QAT.get(name)(options)
    unknown = set(options) - made.reads
    if unknown:
        raise ConfigError(
            f"The quantizer {name!r} has no option {min(unknown)!r}.",
            fix=did_you_mean(min(unknown), made.reads),
        )
    return made
