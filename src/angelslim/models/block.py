"""What a blockwise method works on: the layers of one block, and the means to run it.

A decoder block and a single expert of a mixture look the same here: a module with linears, calibration inputs that
run through it, results to hand in. A `Runner` does the running, so a method knows nothing of streams and routers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ..base.errors import ModelError
from ..numerics.error import Histogram, LayerRecord, error_of
from ..numerics.quantize import Quantized
from .inputs import Inputs, Makers, Observe, S
from .loading import Source
from .select import Layer
from .structure import Group

ObservePair = Callable[[Tensor, Tensor | None], None]


@dataclass(frozen=True)
class QuantizedLayer:
    """A method's result for one layer: its codes and scales, the static input scale if any, its record."""

    layer: Layer
    weight: Quantized
    input_scale: Tensor | None
    record: LayerRecord


class Runner(Protocol):
    """Runs calibration samples through one resident module."""

    @property
    def samples(self) -> int:
        """How many samples there are."""

    @property
    def module(self) -> nn.Module:
        """The resident module."""

    def submodule(self, path: str) -> nn.Module:
        """Return a module inside by its full path."""

    def run(self, observe: Mapping[str, Observe], *, keep: bool, again: bool = False) -> None:
        """Run every sample; `keep` makes the outputs the next block's inputs, `again` holds the inputs all the same."""

    def compare(self, observe: Mapping[str, ObservePair]) -> None:
        """Run every sample from its own and from the original model's inputs."""

    def forward(self, samples: Sequence[int]) -> Tensor:
        """Return the module's output for samples of one length ``[samples, tokens, hidden]``."""

    def scale_expert_inputs(self, path: str, scale: Tensor) -> bool:
        """Multiply the input columns of the experts at `path` when they are read; False if they are not streamed."""


@dataclass
class Block:
    """The layers of one block; without calibration data (`samples` 0) only `weight` and `emit` may be used."""

    source: Source
    index: int | None
    layers: tuple[Layer, ...]
    groups: Mapping[str, Group]  # linear's module path -> its group
    device: torch.device
    runner: Runner | None = None
    results: list[QuantizedLayer] = field(default_factory=list)
    changed: dict[str, Tensor] = field(default_factory=dict)  # parameter path -> its new value
    extras: dict[str, Tensor] = field(
        default_factory=dict
    )  # checkpoint tensors that the source does not have
    advanced: bool = False
    streamed: tuple[
        Layer, ...
    ] = ()  # layers of its streamed experts, which come later as blocks of their own
    expert_scales: dict[str, Tensor] = field(
        default_factory=dict
    )  # stack's path -> what its inputs were scaled by
    keeps_outputs: bool = (
        False  # of the run that collects statistics: rounding will not be seen by the next block
    )
    _inputs: Inputs = field(default_factory=Inputs)
    _exact: dict[str, Tensor] = field(default_factory=dict)  # rescaled parameters before they were rounded

    @property
    def samples(self) -> int:
        """How many calibration samples run through the block."""
        return 0 if self.runner is None else self.runner.samples

    @property
    def module(self) -> nn.Module:
        """The block itself, resident."""
        return self._runner.module

    @property
    def _runner(self) -> Runner:
        assert self.runner is not None, "no calibration samples"
        return self.runner

    def weight(self, layer: Layer) -> Tensor:
        """Return a layer's weight ``[out, in]``, refusing NaN and infinity."""
        if layer.module is not None and self.runner is not None:
            path = f"{layer.module}.weight"
            # Rounding a rescaled weight to sixteen bits first would add a percent to the error of eight.
            weight = self.exact(path) if layer.scheme.weight.format.bits >= 8 else self.parameter(path)
        else:
            weight = self.source.checkpoint.read(layer.tensor, self.device)
        if not all(math.isfinite(value) for value in torch.stack(torch.aminmax(weight)).tolist()):
            raise ModelError(
                f"The weight {layer.tensor!r} holds NaN or infinity.",
                fix="The source model is damaged; restore this tensor or add the layer to ignore_layers.",
            )
        return weight

    def published(self, layer: Layer) -> Quantized | None:
        """Return a layer's own codes where the model was published in the very numbers that are asked for.

        None where it was not, and where the weight was changed since.
        """
        if self.changed:
            return None
        return self.source.checkpoint.published(layer.tensor, layer.scheme.weight, self.device)

    def submodule(self, path: str) -> nn.Module:
        """Return a module of the resident block by its full path."""
        return self._runner.submodule(path)

    def parameter(self, path: str) -> Tensor:
        """Return a parameter or buffer of the resident block by its full path, as it is now."""
        module, _, leaf = path.rpartition(".")
        found: Tensor = getattr(self._runner.submodule(module), leaf)
        return found

    def exact(self, path: str) -> Tensor:
        """Return a parameter in float32 where it was rescaled, and as it is elsewhere."""
        return self._exact.get(path, self.parameter(path))

    def rewrite(self, path: str, value: Tensor) -> None:
        """Give a parameter another value of the same shape, for the samples and in the written checkpoint.

        Transforms use it. Weights that a rounding method will replace are rewritten too: `weight` then returns
        the new value. The parameter keeps its own type.
        """
        self._assign(path, value)
        self._exact.pop(path, None)
        self.changed[path] = self.parameter(path)
        self._inputs.forget()
        self.advanced = False

    def rescale(self, values: Mapping[str, Tensor], readers: Sequence[str], columns: Tensor) -> None:
        """Rewrite parameters that together only divide the inputs of `readers` by `columns` ``[in]``.

        The block's function stays, so what is known of its inputs and outputs does too.
        """
        eight = {f"{layer.module}.weight" for layer in self.layers if layer.scheme.weight.format.bits >= 8}
        for path, value in values.items():
            self._assign(path, value)
            self.changed[path] = self.parameter(path)
            if path in eight:
                self._exact[path] = value.float()
        self._inputs.rescaled(readers, columns)

    def expect(self, makers: Makers) -> None:
        """Say what statistics will be asked for, so that they are collected in one run of the samples."""
        self._inputs.expect(makers)

    def statistic(self, kind: type[S], path: str) -> S:
        """Return the statistic of a linear's inputs, as they are before any weight is rounded; it was expected."""
        return self._inputs.find(kind, path, self._collect_statistics)

    def take(self, kind: type[S], path: str) -> S:
        """Return a statistic that nobody else will ask for, so that it is gone with its user: they are large."""
        found = self.statistic(kind, path)
        self._inputs.drop(kind, path)
        return found

    def _collect_statistics(self, observe: Mapping[str, Observe]) -> None:
        self._runner.run(observe, keep=self.keeps_outputs, again=True)
        self.advanced = self.advanced or self.keeps_outputs

    def replace(self, layer: Layer, weight: Tensor) -> None:
        """Let the block compute with another weight ``[out, in]`` from now on, in the model's own type."""
        assert layer.module is not None
        self._exact.pop(f"{layer.module}.weight", None)
        self._assign(f"{layer.module}.weight", weight)

    def _assign(self, path: str, value: Tensor) -> None:
        module, _, leaf = path.rpartition(".")
        owner, now = self._runner.submodule(module), self.parameter(path)
        assert value.shape == now.shape, (path, value.shape, now.shape)
        setattr(owner, leaf, nn.Parameter(value.detach().to(now.device, now.dtype), requires_grad=False))

    def scale_expert_inputs(self, path: str, scale: Tensor) -> bool:
        """Multiply the input columns of all experts at `path` by `scale` ``[in]`` from now on.

        Returns False where the experts are not streamed, and so cannot be changed.
        """
        done = self._runner.scale_expert_inputs(path, scale)
        if done:
            self.expert_scales[path] = self.expert_scales.get(path, 1.0) * scale
        return done

    def extra(self, name: str, tensor: Tensor) -> None:
        """Add a tensor to the written checkpoint, such as the scale of a KV cache."""
        self.extras[name] = tensor

    def advance(self, observe: Mapping[str, Observe] | None = None) -> None:
        """Run all samples through the block as it is now and keep the outputs as the next block's inputs.

        `observe` maps module paths of linears to functions that receive each of their inputs ``[tokens, in]``.
        Experts that are streamed follow later, as blocks of their own.
        """
        self._runner.run(observe or {}, keep=True)
        self.advanced = True

    def collect(self, observe: Mapping[str, Observe]) -> None:
        """Run all samples through the block as it is now and keep nothing; `observe` is that of `advance`."""
        self._runner.run(observe, keep=False)

    def compare(self, observe: Mapping[str, ObservePair]) -> None:
        """Run all samples through the block as it is now, from their own inputs and from the original model's.

        `observe` gets both inputs of a linear ``[tokens, in]``; the second is None where the tokens of the two
        cannot be matched (an expert that was sent others). Only for methods that follow the original, which call
        it once, before they replace a weight.
        """
        self._runner.compare(observe)

    def forward(self, samples: Sequence[int]) -> Tensor:
        """Return the output of the block as it is now for samples of one length ``[samples, tokens, hidden]``.

        Nothing is stored. Gradients flow if the caller asks for them; streamed experts contribute nothing.
        """
        return self._runner.forward(samples)

    def emit(
        self,
        layer: Layer,
        original: Tensor,
        weight: Quantized,
        input_scale: Tensor | None = None,
        activations: Histogram | None = None,
        *,
        output_error: float | None = None,
        note: str = "",
        choice: str = "",
    ) -> None:
        """Hand in a layer's result, with the weight it replaces for the record."""
        restored = weight.dequantize()
        sqnr_db, relative_error = error_of(original, restored)
        record = LayerRecord(
            name=layer.name,
            block=layer.block,
            scheme=str(layer.scheme),
            shape=layer.shape,
            bits_per_weight=weight.bits_per_weight,
            sqnr_db=sqnr_db,
            relative_error=relative_error,
            weights=Histogram.of(original, restored),
            activations=activations,
            input_scale=None if input_scale is None else float(input_scale),
            output_error=output_error,
            note=note,
            choice=choice,
        )
        self.results.append(QuantizedLayer(layer, weight, input_scale, record))
