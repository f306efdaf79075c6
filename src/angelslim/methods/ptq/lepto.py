"""LeptoQuant: rounding to nearest with static FP8 input scales that were chosen by the block's output.

For each operator (the linears that share an input) the scales of `numerics.lepto` compete: the ordinary static one,
and those whose largest code stands for an outlier. AngelSlim (arXiv 2602.21233, section 2.3.2) takes the one with the
least squared error of the block's output when the operator's own input is quantized and the weights are not. So does
this, in an order and at a price that it states:

* Running the block for twenty candidates and four operators would cost eighty passes. Each candidate's error at its
  own operator is therefore predicted first, from one histogram (`MagnitudeCounts`); only the `FINALISTS` best that
  promise less than the ordinary scale run through the block, on a few samples spread over all of them.
* Operators are taken in turn, the others quantized as decided so far, and a scale stays unless another gives a
  smaller error. So on the samples of the search the block's error, all inputs quantized, never rises.
* What a block gains must be worth it: its operators return to their ordinary scales unless together they take
  `lepto_margin` off its error. Smaller gains of a block were found not to be gains of the model, whose KL divergence
  moved by about one percent either way. A margin of 0 is the paper's rule.
* What all blocks together gain must be a gain of the model: with `lepto_accept: calibration`, the default, every scale
  that differs from the ordinary one is handed in beside it (`models.contest`), and the run writes the ordinary ones
  unless the others give a smaller KL divergence of the logits on the calibration samples (`angelslim.trial`). ``none``
  takes the scales as they were found, as the paper does.

The extended mode weighs errors by token (`_error`), since the paper's mean is decided by the few tokens whose hidden
states are huge. Weights are rounded as by `rtn`, and the checkpoint is an ordinary static FP8 one; only
``input_scale`` differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...base import parallel
from ...base.errors import SchemeError
from ...models.block import Block
from ...models.contest import contest
from ...models.inputs import Makers
from ...models.select import Layer
from ...models.structure import Group
from ...numerics.lepto import PATTERNS, Candidate, MagnitudeCounts, candidates, shortlist
from ...numerics.observers import AbsMax
from ...numerics.quantize import TINY, fake_quantize
from ...numerics.scheme import PER_TENSOR, Quant, Scheme
from ._processes import round_together
from ._shared import InputStatistics, by_group, round_weight, shared_scale

MARGIN = 0.05  # share of a block's error that the scales of its operators must take off to be kept
FINALISTS = 2  # candidates of an operator that run through the block
FEW = 4  # samples that are always searched; more only as far as the price allows


@dataclass(eq=False)
class Operator:
    """Linears that share an input, what was seen of it, and the scale that it has for now."""

    layers: list[Layer]
    quant: Quant
    statistics: InputStatistics
    counts: MagnitudeCounts
    plain: Tensor = field(default_factory=lambda: torch.ones(1, 1))
    scale: Tensor = field(default_factory=lambda: torch.ones(1, 1))
    choice: str = "alpha 0"
    gain: float = 1.0  # error of the block's output with the scale chosen, over that before
    finalists: list[Candidate] = field(default_factory=list)
    promise: float = 0.0  # share of the operator's own error that the best of them is predicted to take off

    def update(self, inputs: Tensor) -> None:
        """Take in one sample's inputs ``[tokens, in]``."""
        self.statistics.update(inputs)
        self.counts.update(inputs)

    def reset(self) -> None:
        """Return to the ordinary scale."""
        self.scale, self.choice, self.gain = self.plain, "alpha 0", 1.0

    def merge(self) -> None:
        """Add what the other processes of the run have seen."""
        self.statistics.merge()
        self.counts.merge()


class LeptoQuant:
    """Options: `lepto_extended` (more candidates, and errors relative to each token), `lepto_margin`, `lepto_accept`."""

    reads = frozenset({"lepto_extended", "lepto_margin", "lepto_accept"})
    follows_original = False
    keeps_function = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.extended = bool(options.get("lepto_extended", False))
        margin = options.get("lepto_margin")
        self.margin = MARGIN if margin is None else float(margin)
        self.guarded = (options.get("lepto_accept") or "calibration") == "calibration"

    def needs_data(self, scheme: Scheme) -> bool:
        """The search runs the block; a scheme without static FP8 inputs has nothing to search for."""
        if scheme.input is None or not _searchable(scheme.input):
            raise SchemeError(
                f"LeptoQuant chooses static per-tensor FP8 input scales; {scheme} has none.",
                fix="Use scheme: fp8_static, or another method.",
            )
        return True

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """The counts of each operator; the original outputs of the samples that are searched are activations."""
        operators = {groups.get(layer.module or "", layer.name) for layer in layers}
        return len(operators) * PATTERNS * 16

    def statistics(self, block: Block) -> Makers:
        """Its sums are made in a run of its own, for layers that run together."""
        return {}

    def process(self, block: Block) -> None:
        """Choose the operators' scales, then round every layer."""
        members = by_group(block)
        operators = self._operators(block, members) if block.samples else {}
        if operators:
            self._search(block, list(dict.fromkeys(operators.values())))
        round_together(block, members, lambda layers: self._round_group(block, layers, operators))

    def _round_group(self, block: Block, layers: list[Layer], operators: Mapping[str, Operator]) -> None:
        shared = shared_scale(block, layers)
        for layer in layers:
            weight = block.weight(layer)
            quantized = round_weight(weight, layer.scheme.weight, shared)
            operator = operators.get(layer.name)
            if operator is None:
                block.emit(layer, weight, quantized)
                continue
            seen = operator.statistics.histogram(operator.quant, operator.scale)
            choice = f"{operator.choice}, block error x{operator.gain:.4f}"
            block.emit(layer, weight, quantized, operator.scale.clone(), seen, choice=choice)
            if self.guarded and not torch.equal(operator.scale, operator.plain):
                seen = operator.statistics.histogram(operator.quant, operator.plain)
                choice = f"alpha 0, {operator.choice} was not accepted, block error x1.0000"
                contest(block, operator.plain.clone(), seen, choice)

    def _operators(self, block: Block, members: list[list[Layer]]) -> dict[str, Operator]:
        """Return the operator of each layer (name -> operator); overrides may leave layers without static inputs."""
        found: dict[str, Operator] = {}
        for layers in members:
            static = [layer for layer in layers if layer.scheme.needs_data]
            if not static or static[0].scheme.input is None:  # needs_data says that there is one
                continue
            norms = torch.stack([block.weight(layer).float().square().sum(0) for layer in static]).sum(0)
            counts = MagnitudeCounts(norms)
            operator = Operator(static, static[0].scheme.input, InputStatistics(AbsMax()), counts)
            found |= {layer.name: operator for layer in static}
        return found

    def _search(self, block: Block, operators: list[Operator]) -> None:
        """Observe every input, then give each operator in turn the scale with the least error of the block."""
        block.collect({_path(operator.layers[0]): operator.update for operator in operators})
        for operator in operators:
            operator.merge()
            grid, amax = operator.quant.format, operator.statistics.observer.amax()
            operator.plain = operator.scale = operator.statistics.scale(operator.quant).to(block.device)
            if _searchable(operator.quant) and block.index is not None:  # no trial looks at towers
                found = candidates(operator.counts, amax, grid, extended=self.extended)
                operator.finalists, operator.promise = shortlist(operator.counts, found, grid, FINALISTS)
        contested = [operator for operator in operators if operator.finalists]
        if not contested or max(operator.promise for operator in contested) < self.margin:
            return  # a block cannot gain more than the best of its operators
        runs = 2 + sum(len(operator.finalists) for operator in contested)
        first, count = parallel.numbered(block.samples)
        searched = spread(count, max(FEW, count // (2 * runs)))
        samples = [number - first for number in searched if first <= number < first + block.samples]
        original = [_output(block, sample) for sample in samples]
        with _quantized_inputs(block, operators):
            before = error = _error(block, samples, original, self.extended)
            for operator in contested:
                error = self._decide(block, operator, samples, original, error)
        if error > before * (1 - self.margin):
            for operator in contested:
                operator.reset()

    def _decide(
        self, block: Block, operator: Operator, samples: list[int], original: list[Tensor], error: float
    ) -> float:
        """Try an operator's finalists in place; keep the best scale and return the block's error with it."""
        start, kept = error, operator.scale
        for candidate in operator.finalists:
            operator.scale = candidate.scale.to(block.device)
            found = _error(block, samples, original, self.extended)
            if found < error:
                error, kept, operator.choice = found, operator.scale, candidate.name
        operator.scale = kept
        operator.gain = error / start if start > 0 else 1.0
        return error


def spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` of the numbers below `count`, evenly spaced.

    >>> spread(10, 3), spread(2, 8)
    ([0, 4, 8], [0, 1])
    """
    return list(range(0, count, max(1, math.ceil(count / wanted))))


def _searchable(quant: Quant) -> bool:
    return not quant.dynamic and quant.granularity == PER_TENSOR and quant.format.kind == "float"


def _path(layer: Layer) -> str:
    assert layer.module is not None
    return layer.module


def _output(block: Block, sample: int) -> Tensor:
    with torch.no_grad():
        return block.forward([sample])


def _error(block: Block, samples: list[int], original: list[Tensor], relative: bool) -> float:
    """Return the squared error of the block's output, summed over the samples of all processes.

    `relative` divides each token's error by its squared output, as the norm that reads it will: otherwise the few
    tokens whose hidden states are hundreds of times larger decide alone.
    """
    error = torch.zeros((), dtype=torch.float64, device=block.device)
    for sample, before in zip(samples, original, strict=True):
        lost = (_output(block, sample).float() - before.float()).square().sum(-1)
        if relative:
            lost /= before.float().square().sum(-1).clamp(min=TINY)
        error += lost.sum(dtype=torch.float64)
    return float(parallel.total(error))


@contextmanager
def _quantized_inputs(block: Block, operators: list[Operator]) -> Iterator[None]:
    """Let every operator see its input as the engine would, with the scale that it has at the time."""
    assert block.runner is not None
    handles = []
    for operator in operators:
        hook = _Rounding(operator)
        for layer in operator.layers:
            handles.append(block.runner.submodule(_path(layer)).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Rounding:
    """Rounds an operator's input once for all its members."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.given: Tensor | None = None  # held, so that another tensor cannot take its place in memory
        self.rounded: tuple[Tensor, Tensor] | None = None  # with which scale, to what

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = self.operator.scale
        if self.rounded is None or self.given is not args[0] or self.rounded[0] is not scale:
            self.given = args[0]
            self.rounded = scale, fake_quantize(args[0], self.operator.quant, scale)
        return (self.rounded[1], *args[1:])


METHOD = LeptoQuant
