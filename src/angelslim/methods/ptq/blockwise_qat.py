"""Quantization-aware training, one decoder block at a time.

Each block is trained with a quantizer of `methods.qat` on its linears until its output is near what the original
model's block gave on its own inputs: block-wise reconstruction (BRECQ, arXiv 2102.05426) with weights and scales both
free, the first phase of EfficientQAT (arXiv 2407.11062). The block's inputs are those that the trained blocks before it
left, so each block also makes up for what was lost before. It needs the memory of one block: its weights in float32 with
gradient, two moments and the best state, and in host memory one output of the block for each sample.

A step runs `learn_batch` samples; the loss is the mean squared error, AdamW moves the master weights with `weight_lr` and
learned scales with `quant_lr`, both falling by a cosine to the `min_lr_factor`-th part. Norms and biases stay. After each
of the `epochs` the block is measured on all samples as it would be merged, and the best of these states is kept, the
untrained one included: training never makes the block's output worse on its samples. Models of 16-bit types compute in
bfloat16 over the float32 masters.

Inputs that an engine will round are not rounded while training. Layers outside the blocks, experts of a fused stack that
cannot be streamed and layers that no sample reached keep the quantizer's first values, and are noted. A streamed expert is
trained by the tokens that were sent to it, with its own original output as the aim.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...base import parallel
from ...base.errors import ConfigError, SchemeError
from ...models.block import Block
from ...models.inputs import Makers
from ...models.select import Layer
from ...models.structure import Group
from ...numerics.lowbit.record import LowBit
from ...numerics.quantize import SCALE_TYPES, Quantized
from ...numerics.scheme import Quant, Scheme
from ..base import make_quantizer
from ..qat._quantizer import Quantizer
from ..qat.base import NO_BIAS, attach, detach, master_weight, merge, quantizers, set_progress
from ._outputs import of_one_length, outputs_of
from ._shared import head_of

EPOCHS, BATCH = 10, 8
RATE = 1e-4
LEAST = 20.0  # the rate at the end is this part of the first
UNREACHED = "the quantizer's first values: no calibration token reached it"
OUTSIDE = "the quantizer's first values: it lies outside the blocks"


class BlockwiseQAT:
    """Options: `quantizer` (seq), `quantizer_options`, `epochs`, `learn_batch`, `weight_lr`, `quant_lr`,
    `min_lr_factor`, `weight_decay`.
    """

    reads = frozenset(
        {
            "quantizer",
            "quantizer_options",
            "epochs",
            "learn_batch",
            "weight_lr",
            "quant_lr",
            "min_lr_factor",
            "weight_decay",
        }
    )
    follows_original = True
    keeps_function = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.name = str(options.get("quantizer") or "seq")
        self.options = dict(options.get("quantizer_options") or {})
        make_quantizer(self.name, self.options)  # an unknown name or option fails now
        self.epochs = int(_given(options, "epochs", EPOCHS))
        self.batch = int(_given(options, "learn_batch", BATCH))
        self.weight_lr = _given(options, "weight_lr", RATE)
        self.quant_lr = _given(options, "quant_lr", RATE)
        self.least = _given(options, "min_lr_factor", LEAST)
        self.decay = _given(options, "weight_decay", 0.0)
        if self.epochs < 1 or self.batch < 1 or self.least < 1:
            raise ConfigError(
                "epochs, batch_size and min_lr_factor of block-wise training count from 1.",
                fix="Leave them out for the usual ones.",
            )
        if min(self.weight_lr, self.quant_lr, self.decay) < 0:
            raise ConfigError(
                "weight_lr, quant_lr and wd of block-wise training are not negative.",
                fix="Leave them out for the usual ones.",
            )

    def needs_data(self, scheme: Scheme) -> bool:
        """Always; static input scales are refused here."""
        _check(scheme)
        return True

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """Of each weight the master, its gradient, two moments, the best state and Q(W) with its gradient."""
        return 7 * 4 * sum(layer.shape[0] * layer.shape[1] for layer in layers if layer.module is not None)

    def statistics(self, block: Block) -> Makers:
        """It compares with the original, which is a run of its own."""
        return {}

    def process(self, block: Block) -> None:
        """Train the block, put the merged weights into it and run the samples through."""
        for layer in block.layers:
            _check(layer.scheme)
        if not block.samples:
            for layer in block.layers:
                original = block.weight(layer)
                block.emit(layer, original, self._first(layer, original), note=OUTSIDE)
            return
        tokens, aims = _watch(block)
        originals = {layer: block.weight(layer).clone() for layer in block.layers}
        reached = [x for x in block.layers if x.module is not None and tokens[head_of(block, x)]]
        found, notes = self._trained(block, reached, aims) if reached else ({}, {})
        for layer in block.layers:
            weight = found[layer] if layer in found else self._first(layer, originals[layer])
            note = notes.get(layer, "") if layer in found else UNREACHED
            block.emit(layer, originals[layer], weight, note=note)
            if layer.module is not None:
                block.replace(layer, weight.dequantize())
        block.advance()

    def _quantizer(self, scheme: Scheme) -> Quantizer:
        """Return the quantizer whose scales are numbers that the file will hold."""
        options = dict(self.options)
        kind = scheme.weight.scale
        made = make_quantizer(self.name, options)
        if kind in ("float16", "bfloat16") and "scale_dtype" in made.reads - options.keys():
            return make_quantizer(self.name, {**options, "scale_dtype": kind})
        return made

    def _first(self, layer: Layer, weight: Tensor) -> Quantized:
        """Return what the quantizer makes of a weight before any training."""
        quantizer = self._quantizer(layer.scheme)
        try:
            quantizer.start(weight.float())
        except SchemeError as error:
            raise SchemeError(error.what, fix=error.fix, where=layer.name) from None
        return _as_asked(quantizer.to(weight.device).merged(weight.float()), layer.scheme.weight)

    # -------------------------------------------------------------------------------------- training

    def _trained(
        self, block: Block, layers: Sequence[Layer], aims: Sequence[Tensor]
    ) -> tuple[dict[Layer, Quantized], dict[Layer, str]]:
        """Train the layers together; return codes and scales, and what has to be said of a layer.

        The linears are ordinary ones afterwards, with weights of the model's own type that the caller replaces.
        """
        linears = {layer: _linear(block, layer) for layer in layers}
        dtypes = {layer: linear.weight.dtype for layer, linear in linears.items()}
        biases = {layer: linear.bias for layer, linear in linears.items()}
        try:
            for layer, linear in linears.items():
                linear.weight = nn.Parameter(linear.weight.detach().float())
                attach(linear, self._quantizer(layer.scheme), layer.name)
            self._learn(block, aims, _computing(block, dtypes.values()))
            names = {id(linear): name for name, linear, _ in quantizers(block.module)}
            merged = merge(block.module)
        finally:
            detach(block.module)
        found, notes = {}, {}
        for layer, linear in linears.items():
            record = merged[names[id(linear)]]
            found[layer] = _as_asked(record, layer.scheme.weight)
            linear.weight = nn.Parameter(linear.weight.detach().to(dtypes[layer]), requires_grad=False)
            if isinstance(record, LowBit) and record.bias is not None:
                own = f"{layer.module}.bias"
                if biases[layer] is not None and own in block.source.tensors_of:
                    block.rewrite(own, linear.bias)
                else:
                    linear.bias = biases[layer]
                    notes[layer] = NO_BIAS.format(record.bias.abs().max().item())
        return found, notes

    def _learn(self, block: Block, aims: Sequence[Tensor], computing: AbstractContextManager[Any]) -> None:
        """Take the steps of all epochs; masters and scales end in the best state that was measured."""
        module = block.module
        own = [(linear, quantizer) for _, linear, quantizer in quantizers(module)]
        masters = [master_weight(linear) for linear, _ in own]
        scales: list[Tensor] = [
            getattr(quantizer, name) for _, quantizer in own for name in quantizer.learned
        ]
        groups: list[dict[str, Any]] = [
            {"params": masters, "lr": self.weight_lr, "weight_decay": self.decay},
            *([{"params": scales, "lr": self.quant_lr, "weight_decay": 0.0}] if scales else []),
        ]
        firsts: list[float] = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups)
        # Processes hold different numbers of samples and take the same steps, some of them without a sample.
        each = int(parallel.highest(torch.tensor(-(-len(aims) // self.batch))).item())
        steps = self.epochs * each
        # Seeded by the block, so that a run that was killed learns the same again.
        rng = random.Random(f"{block.index}/{block.layers[0].name}")  # noqa: S311  not for secrets
        set_progress(module, 0, steps)
        smallest = mean_error(block, aims, computing)
        best = [value.detach().clone() for value in (*masters, *scales)]
        for epoch in range(self.epochs):
            order = rng.sample(range(len(aims)), len(aims))
            for number in range(each):
                step = epoch * each + number
                set_progress(module, step, steps)
                for group, first in zip(optimizer.param_groups, firsts, strict=True):
                    group["lr"] = first * share_of_rate(step, steps, self.least)
                chosen = order[number * self.batch : (number + 1) * self.batch]
                _gradients(block, [*masters, *scales], chosen, aims, computing)
                optimizer.step()
            set_progress(module, (epoch + 1) * each, steps)
            error = mean_error(block, aims, computing)
            if error < smallest:
                smallest = error
                for kept, value in zip(best, (*masters, *scales), strict=True):
                    kept.copy_(value.detach())
        with torch.no_grad():
            for kept, value in zip(best, (*masters, *scales), strict=True):
                value.copy_(kept)


def share_of_rate(step: int, steps: int, least: float) -> float:
    """Return the part of the first rate at a step: a cosine from 1 to ``1 / least`` at the last one."""
    end = 1 / least
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * step / max(steps - 1, 1)))


def mean_error(block: Block, aims: Sequence[Tensor], computing: AbstractContextManager[Any]) -> float:
    """Return the mean squared error of the block's output on all samples of all processes, as it would be merged."""
    _train_mode(block.module, False)
    lost = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad(), computing:
        for index, aim in enumerate(aims):
            wanted = aim.to(block.device)
            difference = block.forward([index]).float().reshape(wanted.shape) - wanted.float()
            lost += torch.tensor([difference.square().sum().item(), aim.numel()], dtype=torch.float64)
    summed, count = parallel.total(lost).tolist()
    return float(summed / max(count, 1))


def _gradients(
    block: Block,
    trained: Sequence[Tensor],
    chosen: Sequence[int],
    aims: Sequence[Tensor],
    computing: AbstractContextManager[Any],
) -> None:
    """Set the gradients of the mean squared error of the block's output on the chosen samples of all processes."""
    _train_mode(block.module, True)
    for value in trained:
        value.grad = None
    count = max(parallel.total_count(sum(aims[index].numel() for index in chosen)), 1)
    with torch.enable_grad():
        for alike in of_one_length(chosen, aims):
            wanted = torch.cat([aims[index] for index in alike]).to(block.device)
            with computing:
                output = block.forward(alike)
            lost = (output.float().reshape(wanted.shape) - wanted.float()).square().sum() / count
            torch.autograd.backward(lost, inputs=list(trained))
    for value in trained:
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        value.grad = parallel.total(gradient)


def _train_mode(module: nn.Module, flag: bool) -> None:
    """Switch the quantizers alone: what else of the model differs in training, such as dropout, stays off."""
    for _, _, quantizer in quantizers(module):
        quantizer.train(flag)


def _computing(block: Block, dtypes: Any) -> AbstractContextManager[Any]:
    """Return the context in which the block computes: bfloat16 products where the model's weights have 16 bits."""
    half = any(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes)
    return torch.autocast(block.device.type, torch.bfloat16, enabled=half)


def _watch(block: Block) -> tuple[dict[str, int], list[Tensor]]:
    """Return how many tokens of all processes reached each group's first linear, and the original outputs."""
    heads = sorted({head_of(block, layer) for layer in block.layers if layer.module is not None})
    tokens = dict.fromkeys(heads, 0)
    aims = outputs_of(block, {head: partial(_count, tokens, head) for head in heads})
    return {head: parallel.total_count(count) for head, count in tokens.items()}, aims


def _count(tokens: dict[str, int], head: str, inputs: Tensor, _originals: Tensor | None) -> None:
    tokens[head] += inputs.shape[0]


def _linear(block: Block, layer: Layer) -> nn.Linear:
    block.weight(layer)  # refuses NaN and infinity
    found = block.submodule(str(layer.module))
    if not isinstance(found, nn.Linear):
        raise SchemeError(
            f"{layer.name!r} is a {type(found).__name__}, and only linear layers are trained.",
            fix="Add it to quantization.ignore_layers.",
        )
    return found


def _as_asked(record: LowBit | Quantized, quant: Quant) -> Quantized:
    """Return the same numbers under the scheme that was announced for them: what a file's header says."""
    plain = record.quantized() if isinstance(record, LowBit) else record
    if not isinstance(record, LowBit):
        return replace(plain, quant=quant)
    assert plain.quant.format.bits == quant.format.bits and plain.quant.format.centre == quant.format.centre
    scale = plain.scale.to(SCALE_TYPES.get(quant.scale, torch.float32))
    assert torch.equal(scale.float(), record.scale.float()), quant
    return Quantized(plain.codes, scale, None, quant)


def _check(scheme: Scheme) -> None:
    """Refuse what is not learned here."""
    if scheme.needs_data:
        raise SchemeError(
            "Static input scales are not trained.", fix="Use a scheme with dynamic activations."
        )


def _given(options: Mapping[str, Any], name: str, usual: float) -> float:
    value = options.get(name)
    return usual if value is None else float(value)


METHOD = BlockwiseQAT
