"""Learned rounding (AutoRound): whether a weight goes up or down, and each tile's range, by the block's output.

All weights of a block learn together for a few hundred steps (Cheng et al. 2023, arXiv 2309.05516; the arithmetic is
`numerics.learned`). A step runs a few calibration samples through the block as it is rounded now, compares its output
with what the original model's block gave on its own inputs, and moves every weight against the gradient's sign. What
had the smallest loss is kept. The block's inputs are those that the rounded blocks before it left, so each block also
makes up for what was lost before. The original's activations are stored beside, as for GPTAQ.

Symmetric scales may be negative, as in the paper's own program: integer codes reach one step further down than up, and
the sign turns the long end to the tile's largest weight.

With `learn_from: gptq` the start is not rounding to nearest but GPTQ's codes, with searched scales and descent
(`numerics.refine`). It costs a Hessian more and needs fewer steps.

What it cannot learn is rounded to nearest and noted: layers outside the blocks, those that no sample reached. It
learns integer formats in groups or channels; other schemes are refused. An expert that is streamed learns from the
tokens that were sent to it, with its own original output as the aim.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...base import parallel
from ...base.errors import ConfigError, SchemeError
from ...models.block import Block, ObservePair
from ...models.inputs import Makers
from ...models.select import Layer
from ...models.structure import Group
from ...numerics import compensate, refine
from ...numerics.learned import Rounding, step_size
from ...numerics.observers import make_observer
from ...numerics.quantize import Quantized, quantize_with, scale_type
from ...numerics.scheme import PLAIN_SCALES, Scheme, format_named
from ._outputs import of_one_length, outputs_of
from ._shared import InputStatistics, head_of, round_weight

ITERATIONS = 200
BATCH = 8
FROM_CODES = 0.01  # the first step where the start is GPTQ's codes: they are near the end already
UNREACHED = "rounded to nearest: no calibration token reached it"
STARTS = ("nearest", "gptq")


class Learned:
    """Options: `iterations`, `lr`, `learn_batch`, `learn_from`, `damp`; `observer`, `percentile` for static inputs."""

    reads = frozenset({"iterations", "lr", "learn_batch", "learn_from", "damp", "observer", "percentile"})
    follows_original = True
    keeps_function = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.iterations = int(options.get("iterations") or ITERATIONS)
        self.batch = int(options.get("learn_batch") or BATCH)
        self.start = str(options.get("learn_from") or "nearest")
        if self.start not in STARTS:
            raise ConfigError(f"learn_from is {self.start!r}.", fix=f"Use one of {', '.join(STARTS)}.")
        usual = 1 / self.iterations if self.start == "nearest" else FROM_CODES
        self.lr = float(options.get("lr") or usual)
        if self.iterations < 1 or self.batch < 1 or not 0 < self.lr <= 1:
            raise ConfigError(
                "iterations and learn_batch count from 1, lr is a share of a step.",
                fix="Leave them out for the usual ones.",
            )
        self.damp = float(options.get("damp") or compensate.DAMP)
        self.observer = str(options.get("observer", "absmax"))
        self.percent = float(options.get("percentile", 99.99))
        make_observer(self.observer, format_named("fp8_e4m3"), self.percent)  # an unknown name fails now

    def needs_data(self, scheme: Scheme) -> bool:
        """Always; a scheme that it cannot learn is refused here."""
        _check(scheme)
        return True

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """What a weight takes while it learns: itself, V, its gradient and the steps between, in float32."""
        inside = [layer for layer in layers if layer.module is not None]
        learning = 7 * 4 * sum(layer.shape[0] * layer.shape[1] for layer in inside)
        if self.start == "nearest":
            return learning
        widths = {groups.get(str(layer.module), layer.name): 4 * layer.shape[1] ** 2 for layer in inside}
        return learning + sum(widths.values()) + 6 * max(widths.values(), default=0)

    def statistics(self, block: Block) -> Makers:
        """It compares with the original, which is a run of its own."""
        return {}

    def process(self, block: Block) -> None:
        """Learn the roundings of all layers, put them into the block and run the samples through it."""
        for layer in block.layers:
            _check(layer.scheme)
        if not block.samples:
            for layer in block.layers:
                weight = block.weight(layer)
                block.emit(
                    layer,
                    weight,
                    round_weight(weight, layer.scheme.weight),
                    note="rounded to nearest: it lies outside the blocks",
                )
            return
        hessians, ranges, aims = self._observe(block)
        originals = {layer: block.weight(layer).clone() for layer in block.layers}
        rounded = {layer: self._rounded(block, layer, hessians) for layer in block.layers}
        learning = {
            layer: Rounding(originals[layer], rounded[layer], start=self.start == "gptq")
            for layer in block.layers
            if layer.module is not None and hessians[head_of(block, layer)].tokens
        }
        if learning:
            self._learn(block, learning, aims)
        for layer in block.layers:
            self._emit(block, layer, originals[layer], rounded, learning, hessians, ranges)
        block.advance()

    # -------------------------------------------------------------------------------------- watching

    def _observe(
        self, block: Block
    ) -> tuple[dict[str, compensate.Hessian], dict[str, InputStatistics], list[Tensor]]:
        """Return per head the Hessian and the static range, and the original outputs of every sample."""
        hessians: dict[str, compensate.Hessian] = {}
        ranges: dict[str, InputStatistics] = {}
        for layer in block.layers:
            if layer.module is None:
                continue
            head, quant = head_of(block, layer), layer.scheme.input
            hessians.setdefault(head, compensate.Hessian(layer.shape[1], block.device))
            if quant is not None and quant.calibrated and head not in ranges:
                ranges[head] = InputStatistics(make_observer(self.observer, quant.format, self.percent))
        watched: dict[str, ObservePair] = {
            head: _watching(hessian, ranges.get(head), sums=self.start == "gptq")
            for head, hessian in hessians.items()
        }
        aims = outputs_of(block, watched)
        for hessian in hessians.values():
            hessian.merge()
        for statistics in ranges.values():
            statistics.merge()
        return hessians, ranges, aims

    def _rounded(self, block: Block, layer: Layer, hessians: Mapping[str, compensate.Hessian]) -> Quantized:
        """Return the codes and scales that a layer starts from."""
        weight, quant = block.weight(layer), layer.scheme.weight
        dtype = scale_type(quant, weight.dtype)
        hessian = hessians.get(head_of(block, layer)) if layer.module is not None else None
        flat = torch.ones(weight.shape[1], device=weight.device)
        if hessian is None or not hessian.tokens:
            return round_weight(weight, quant)
        factor = compensate.factorize(hessian, damp=self.damp) if self.start == "gptq" else None
        if factor is None:
            scale, zero = refine.searched(weight, quant, flat, dtype, signed=quant.symmetric, steps=1)
            return quantize_with(weight, scale, zero, quant)
        scale, zero = refine.searched(weight, quant, refine.importance(factor), dtype, signed=quant.symmetric)
        found = compensate.gptq(weight, factor, quantize_with(weight, scale, zero, quant))
        return refine.descended(weight, found, factor.squares, damping=factor.damping)

    # -------------------------------------------------------------------------------------- learning

    def _learn(self, block: Block, learning: Mapping[Layer, Rounding], aims: list[Tensor]) -> None:
        """Take the steps; every rounding ends in the state of the smallest loss that was seen."""
        # Seeded by the block, so that a run that was killed learns the same again.
        rng = random.Random(f"{block.index}/{block.layers[0].name}")  # noqa: S311  not for secrets
        queue: list[int] = []
        smallest, best = float("inf"), {layer: one.state() for layer, one in learning.items()}
        for iteration in range(self.iterations):
            while len(queue) < min(
                self.batch, len(aims)
            ):  # a process without samples of an expert only listens
                queue += rng.sample(range(len(aims)), len(aims))
            chosen, queue = queue[: self.batch], queue[self.batch :]
            loss, gradients = self._gradients(block, learning, chosen, aims)
            if loss < smallest:
                smallest, best = loss, {layer: one.state() for layer, one in learning.items()}
            size = step_size(iteration, self.iterations, self.lr)
            for layer, one in learning.items():
                one.step(gradients[layer], size, size)
        for layer, one in learning.items():
            one.restore(best[layer])

    def _gradients(
        self, block: Block, learning: Mapping[Layer, Rounding], chosen: Sequence[int], aims: list[Tensor]
    ) -> tuple[float, dict[Layer, Tensor]]:
        """Return the mean squared error of the block's output on some samples, and its gradients."""
        leaves = {}
        for layer, one in learning.items():
            block.replace(layer, one.value())
            leaves[layer] = block.parameter(f"{layer.module}.weight").requires_grad_(True)
        count = sum(aims[index].numel() for index in chosen)
        loss = 0.0
        with torch.enable_grad():
            for alike in of_one_length(chosen, aims):
                wanted = torch.cat([aims[index] for index in alike]).to(block.device)
                lost = (block.forward(alike).float() - wanted.float()).square().sum() / count
                lost.backward()  # type: ignore[no-untyped-call]
                loss += lost.item()
        gradients = {}
        for layer, leaf in leaves.items():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradients[layer] = parallel.total(gradient.float())
        return parallel.total(torch.tensor([loss])).item(), gradients

    def _emit(
        self,
        block: Block,
        layer: Layer,
        original: Tensor,
        rounded: Mapping[Layer, Quantized],
        learning: Mapping[Layer, Rounding],
        hessians: Mapping[str, compensate.Hessian],
        ranges: Mapping[str, InputStatistics],
    ) -> None:
        """Hand in one layer and let the block compute with it."""
        found = learning[layer].result() if layer in learning else rounded[layer]
        head = head_of(block, layer) if layer.module is not None else ""
        error = scale = histogram = None
        if self.start == "gptq" and layer in learning:
            error = compensate.output_error(original, found, hessians[head].matrix)
        if head in ranges and layer.scheme.input is not None and layer.scheme.input.calibrated:
            scale = ranges[head].scale(layer.scheme.input)
            histogram = ranges[head].histogram(layer.scheme.input, scale)
        note = "" if layer in learning else UNREACHED
        block.emit(layer, original, found, scale, histogram, output_error=error, note=note)
        if layer.module is not None:
            block.replace(layer, found.dequantize())


def _check(scheme: Scheme) -> None:
    """Refuse weights whose rounding cannot be learned here."""
    weight = scheme.weight
    if (
        weight.format.kind != "int"
        or weight.granularity.kind not in ("group", "channel")
        or weight.scale not in PLAIN_SCALES
    ):
        raise SchemeError(
            f"Learned rounding is for integer weights with a scale a group or channel, not for {weight}.",
            fix="Use int4_gptq's method with this scheme, or choose an integer format.",
        )


def _watching(
    hessian: compensate.Hessian, statistics: InputStatistics | None, *, sums: bool
) -> Callable[[Tensor, Tensor | None], None]:
    def watch(inputs: Tensor, _originals: Tensor | None) -> None:
        if sums:
            hessian.update(inputs)
        else:
            hessian.tokens += inputs.shape[0]
        if statistics is not None:
            statistics.update(inputs)

    return watch


METHOD = Learned
