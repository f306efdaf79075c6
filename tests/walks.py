"""The first two blocks of the built-in model under a method that trains them, and what their outputs lose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from angelslim.data.text import calibration_batches
from angelslim.models.activations import ActivationStore
from angelslim.models.block import Block
from angelslim.models.loading import open_model
from angelslim.models.select import groups_by_linear, select
from angelslim.models.walk import BlockStream
from angelslim.numerics.quantize import quantize
from angelslim.work import tokenizer_of

CPU = torch.device("cpu")


def outputs(block: Block) -> list[torch.Tensor]:
    """What the block gives now for each sample."""
    with torch.no_grad():
        return [block.forward([sample]).double() for sample in range(block.samples)]


def walk_two_blocks(
    process: Callable[[Block], Any], scheme: Any, aims_of: Callable[[BlockStream, Block], list[torch.Tensor]]
) -> list[float]:
    """Give `process` the first two blocks of tiny-lm; return the squared error of each one's output, in float64."""
    source = open_model("tiny-lm")
    ids = calibration_batches(tokenizer_of(source.folder), None, samples=12, max_length=96)
    selection = select(source, scheme)
    stream = BlockStream(source, ids, ActivationStore(source.folder, 1 << 30), CPU, follow_original=True)
    stream.prepare(0)
    lost: list[float] = []
    for index in range(2):
        with stream.resident(index) as runner:
            block = Block(source, index, selection.in_block(index), groups_by_linear(source), CPU, runner)
            aims, advance = aims_of(stream, block), block.advance

            def measured(block=block, aims=aims, advance=advance):
                found = zip(outputs(block), aims, strict=True)
                lost.append(sum((now - aim).square().sum().item() for now, aim in found))
                advance()

            block.advance = measured  # the inputs are gone afterwards
            process(block)
    return lost


def nearest(block: Block) -> None:
    """Round every layer to nearest; the original's activations pass through as for methods that follow them."""
    block.compare({})
    for layer in block.layers:
        weight = block.weight(layer)
        rounded = quantize(weight, layer.scheme.weight, weight.dtype)
        block.emit(layer, weight, rounded)
        block.replace(layer, rounded.dequantize())
    block.advance()
