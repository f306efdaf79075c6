"""GPTQ and GPTAQ: rounding whose error the weights that are left make up for, block after block.

For each block the samples run once through the original weights, fed with what the quantized blocks before it
gave; each group of linears collects one Hessian. Then the layers are rounded (`numerics.compensate`), the block takes
the rounded weights, and the samples run again: the next block sees, and can compensate, what happened so far.
Activations themselves are not quantized on the way, also where the scheme quantizes them at run time.

With `gptaq` (Li et al. 2025) the original model's activations travel beside and each layer aims at the output that
it had in the original model. That doubles the stored activations and adds a third run of each block.

Some layers have no Hessian: experts that the checkpoint stores as one stack, embeddings and heads outside the blocks,
linears that no sample reached. They are rounded to nearest, and so is a group whose Hessian cannot be factored; each
carries a note in the record, and the run ends with a warning. Refusing would leave users of such models with nothing,
silence with a false idea of what they have.

Four options go beyond the papers, and are off by default (`numerics.refine` has their arithmetic):

* `mse_range` shrinks each range first where that loses less after compensation; the papers' reach to the largest weight.
* `signed_scales` also lets symmetric scales be negative, which turns the longer end of the grid to that weight.
* `descent` passes over scales and codes follow, each best given all others.
* `aim` corrects each weight before it is rounded, so that it gives the original model's outputs from the inputs that it
  has now; like `gptaq` it follows the original model, and replaces it.

`true_sequential` runs the samples again before each group of a block but the first, so that its Hessian knows what
rounding did to the groups before it (o_proj sees rounded q, k, v).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ...base.errors import ConfigError
from ...models.block import Block, ObservePair
from ...models.inputs import Kind, Makers
from ...models.select import Layer
from ...models.structure import Group
from ...numerics import compensate, refine
from ...numerics.observers import make_observer
from ...numerics.quantize import Quantized, quantize_with, scale_type
from ...numerics.scheme import PER_TENSOR, Format, Scheme, format_named
from ._processes import round_together
from ._shared import InputStatistics, Shared, by_group, head_of, round_weight, shared_scale

EXPERT = "rounded to nearest: an expert of a fused stack has no inputs of its own to watch"
OUTSIDE = "rounded to nearest: it lies outside the blocks"
UNREACHED = "rounded to nearest: no calibration token reached it"
SINGULAR = "rounded to nearest: its Hessian could not be factored, with more damping neither"
DAMPED = "the Hessian needed more damping than usual"
ALL_DEAD = "rounded to nearest: its inputs were zero in all of the calibration"
DEAD = "some inputs were zero in all of the calibration: the weights on them are rounded to nearest"
FEW = "fewer calibration tokens than inputs: its Hessian is singular but for damping"

SEARCHING = 6  # copies of a weight in float32 while its ranges are searched
FACTORING = 6  # matrices [in, in] beside the Hessian at the worst moment of factoring it, as measured


class GPTQ:
    """Options: `actorder`, `damp`, `gptaq`, `alpha`, `mse_range`, `signed_scales`, `descent`, `aim`, `true_sequential`;
    `observer` and `percentile` for static activations.
    """  # fmt: skip

    reads = frozenset(
        {
            "actorder",
            "damp",
            "gptaq",
            "alpha",
            "mse_range",
            "signed_scales",
            "descent",
            "aim",
            "true_sequential",
        }
        | {"observer", "percentile"}
    )

    keeps_function = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.act_order = bool(_given(options, "actorder", True))
        self.damp = _share(options, "damp", compensate.DAMP)
        self.alpha = _share(options, "alpha", compensate.ALPHA)
        self.gptaq, self.aim = bool(options.get("gptaq", False)), _share(options, "aim", 0.0)
        self.follows_original = self.gptaq or self.aim > 0
        self.clips = bool(options.get("mse_range", False))
        self.signed = bool(options.get("signed_scales", False))
        self.descent = int(_given(options, "descent", 0))
        self.sequential = bool(options.get("true_sequential", False))
        self._refuse_contradictions()
        self.observer = str(options.get("observer", "absmax"))
        self.percent = float(options.get("percentile", 99.99))
        make_observer(self.observer, format_named("fp8_e4m3"), self.percent)  # an unknown name fails now

    def _refuse_contradictions(self) -> None:
        if self.gptaq and (self.aim or self.descent):
            raise ConfigError(
                "GPTAQ corrects the drift column by column; aim and descent would correct it again, or undo it.",
                fix="Use int4_gptq with aim and descent, or int4_gptaq without them.",
            )
        if self.sequential and self.follows_original:
            raise ConfigError(
                "true_sequential runs a block again, and the original's activations pass through it only once.",
                fix="Leave out true_sequential, or gptaq and aim.",
            )

    def needs_data(self, scheme: Scheme) -> bool:
        """Hessians come from calibration inputs, whatever the scheme."""
        return True

    def working_memory(self, layers: Sequence[Layer], groups: Mapping[str, Group]) -> int:
        """A Hessian for each input of the block, and what factoring the largest takes."""
        paths = {layer.module: layer.shape[1] for layer in layers if layer.module is not None}
        widths = {groups.get(path, path): 4 * width**2 for path, width in paths.items()}
        held = sum(widths.values()) * (2 if self.follows_original else 1)
        clipping = (
            SEARCHING * 4 * max((x.shape[0] * x.shape[1] for x in layers), default=0) if self.clips else 0
        )
        return held + max(FACTORING * max(widths.values(), default=0), clipping)

    def process(self, block: Block) -> None:
        """Round every layer, put the rounded weights into the block and run the samples through it."""
        hessians, ranges = self._observe(block) if block.samples else ({}, {})
        groups = by_group(block)
        if self.sequential:
            groups = _as_they_run(block, groups)
        for number, part in enumerate([[one] for one in groups] if self.sequential else [groups]):
            if number and part[0][0].module is not None:
                head = head_of(block, part[0][0])
                del hessians[head]
                hessians |= self._observe(block, head)[0]
            self._round(block, part, hessians, ranges)
        if block.samples:
            block.advance()

    def _round(
        self,
        block: Block,
        groups: Sequence[list[Layer]],
        hessians: dict[str, compensate.Hessian],
        ranges: dict[str, InputStatistics],
    ) -> None:
        """Round groups, each in one of the processes, and put all of them into the block."""
        for given in round_together(
            block, groups, lambda members: self._quantize_group(block, members, hessians, ranges)
        ):
            if given.layer.module is not None and block.samples:
                block.replace(given.layer, given.weight.dequantize())

    def statistics(self, block: Block) -> Makers:
        """A Hessian for each group, and a range where its input is static; none where the original is followed."""
        return {} if self.follows_original or not block.samples else self._makers(block)

    def _makers(self, block: Block, only: str | None = None) -> dict[tuple[str, Kind], Callable[[], Any]]:
        """Return what makes the empty statistics of each group's head, or of one head alone."""
        makers: dict[tuple[str, Kind], Callable[[], Any]] = {}
        for layer in block.layers:
            if layer.module is None:
                continue
            head, quant = head_of(block, layer), layer.scheme.input
            if only not in (None, head):
                continue
            makers[head, compensate.Hessian] = partial(compensate.Hessian, layer.shape[1], block.device)
            if quant is not None and quant.calibrated:
                makers.setdefault((head, InputStatistics), partial(self._range, quant.format))
        return makers

    def _range(self, grid: Format) -> InputStatistics:
        return InputStatistics(make_observer(self.observer, grid, self.percent))

    def _observe(
        self, block: Block, only: str | None = None
    ) -> tuple[dict[str, compensate.Hessian], dict[str, InputStatistics]]:
        """Return the Hessian, and the static range if one is needed, of each group's head, or of one head alone.

        The latter is what rounding so far has left: it needs a run of its own.
        """
        makers = self._makers(block, only)
        if only is None and not self.follows_original:
            block.expect(makers)
            found = {(path, kind): block.take(kind, path) for path, kind in makers}
        else:
            found = {key: make() for key, make in makers.items()}
        hessians = {path: each for (path, _), each in found.items() if isinstance(each, compensate.Hessian)}
        ranges = {path: each for (path, _), each in found.items() if isinstance(each, InputStatistics)}
        if only is None and not self.follows_original:
            return hessians, ranges
        watched = {head: _watching(hessian, ranges.get(head)) for head, hessian in hessians.items()}
        if self.follows_original:
            block.compare(watched)
        else:
            block.collect({head: _alone(function) for head, function in watched.items()})
        for each in found.values():
            each.merge()
        return hessians, ranges

    def _quantize_group(
        self,
        block: Block,
        members: list[Layer],
        hessians: dict[str, compensate.Hessian],
        ranges: dict[str, InputStatistics],
    ) -> None:
        head = None if members[0].module is None else head_of(block, members[0])
        hessian = hessians.pop(head or "", None)  # gone when its group is done: they are large
        factor, note = self._factorize(members[0], hessian)
        shared = shared_scale(block, members)
        weights = [block.weight(layer) for layer in members]
        if factor is not None and hessian is not None:
            rounded, errors = self._compensated(members, weights, hessian, factor, shared)
        else:
            rounded = [
                round_weight(weight, layer.scheme.weight, shared)
                for layer, weight in zip(members, weights, strict=True)
            ]
            errors = [None] * len(members)
        for layer, weight, quantized, error in zip(members, weights, rounded, errors, strict=True):
            scale = histogram = None
            if head in ranges and layer.scheme.input is not None and layer.scheme.input.calibrated:
                scale = ranges[head].scale(layer.scheme.input)
                histogram = ranges[head].histogram(layer.scheme.input, scale)
            block.emit(layer, weight, quantized, scale, histogram, output_error=error, note=note)
            if head is not None and block.samples:
                block.replace(layer, quantized.dequantize())

    def _compensated(
        self,
        members: Sequence[Layer],
        weights: Sequence[Tensor],
        hessian: compensate.Hessian,
        factor: compensate.Factor,
        shared: Shared,
    ) -> tuple[list[Quantized], list[float | None]]:
        """Return the codes of layers that share an input, and what each loses of its outputs."""
        aims = [refine.aimed(x, hessian, factor, self.aim) for x in weights] if self.aim else weights
        start = [
            self._scales(layer, weight, exact, factor, shared)
            for layer, weight, exact in zip(members, weights, aims, strict=True)
        ]
        rounded = compensate.together(aims, factor, start)
        if self.descent:
            rounded = [
                refine.descended(exact, each, factor.squares, damping=factor.damping, passes=self.descent)
                for exact, each in zip(aims, rounded, strict=True)
            ]
        lost = [
            compensate.output_error(weight, each, factor.squares)
            for weight, each in zip(weights, rounded, strict=True)
        ]
        return rounded, list(lost)

    def _scales(
        self, layer: Layer, weight: Tensor, exact: Tensor, factor: compensate.Factor, shared: Shared
    ) -> Quantized:
        """Return the weight rounded to nearest with the scales that compensation shall work with."""
        quant = layer.scheme.weight
        fixed = quant in shared and quant.granularity == PER_TENSOR
        if fixed or not (self.clips or self.signed):
            return round_weight(exact.to(weight.dtype), quant, shared)
        two_levels = quant.scale == "e4m3"
        outer = round_weight(weight, quant, shared).global_scale if two_levels else None
        steps = refine.STEPS if self.signed or self.descent else refine.FEWER
        scale, zero = refine.searched(
            exact,
            quant,
            refine.importance(factor),
            scale_type(quant, weight.dtype),
            signed=self.signed,
            steps=steps if self.clips else 1,
            outer=outer,
        )
        return quantize_with(exact, scale, zero, quant, outer)

    def _factorize(
        self, layer: Layer, hessian: compensate.Hessian | None
    ) -> tuple[compensate.Factor | None, str]:
        """Return the factor of a group's Hessian, or None, and what has to be noted about it."""
        if hessian is None:
            return None, OUTSIDE if layer.block is None else EXPERT
        if not hessian.tokens:
            return None, UNREACHED
        alpha = self.alpha if self.gptaq else 0.0
        factor = compensate.factorize(hessian, act_order=self.act_order, damp=self.damp, alpha=alpha)
        if factor is None:
            return None, SINGULAR
        return factor, _remark(hessian, factor, self.damp)


def _remark(hessian: compensate.Hessian, factor: compensate.Factor, damp: float) -> str:
    """Say what a factor hides about the calibration that it comes from; the gravest alone."""
    inputs = len(factor.order)
    found = {
        ALL_DEAD: factor.dead == inputs,
        DAMPED: factor.damping > damp,
        DEAD: factor.dead > 0,
        FEW: hessian.tokens < inputs,
    }
    return next((remark for remark, holds in found.items() if holds), "")


def _as_they_run(block: Block, groups: list[list[Layer]]) -> list[list[Layer]]:
    """Return groups in the order in which they run, which is not that of the checkpoint."""
    order = {linear: place for place, linear in enumerate(block.groups)}
    return sorted(groups, key=lambda members: order.get(str(members[0].module), len(order)))


def _watching(hessian: compensate.Hessian, statistics: InputStatistics | None) -> ObservePair:
    def watch(inputs: Any, originals: Any) -> None:
        hessian.update(inputs, originals)
        if statistics is not None:
            statistics.update(inputs)

    return watch


def _alone(function: ObservePair) -> Any:
    return lambda inputs: function(inputs, None)


def _given(options: Mapping[str, Any], name: str, default: Any) -> Any:
    value = options.get(name)
    return default if value is None else value


def _share(options: Mapping[str, Any], name: str, default: float) -> float:
    value = float(_given(options, name, default))
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}; it is a share.", fix="Use a number from 0 to 1.")
    return value


METHOD = GPTQ
