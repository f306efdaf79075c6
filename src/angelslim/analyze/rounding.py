"""Let a model compute as if some of its layers were rounded and the others were not, then as before.

The unit that is rounded is a linear, or all experts of one role in a block (every ``up_proj``): one expert of 256 does
too little to be told from noise. Rounding is to nearest, with the scheme that the recipe gives the layer, and the
layer's inputs are quantized too where the scheme says so. That is what a layer costs before any method helps it.

Everything runs in float32. In bfloat16 each output is off by 0.2 % for its own sake, as much as an 8-bit layer does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.ptq._shared import InputStatistics, round_weight
from ..models.loading import Source
from ..models.select import Layer
from ..numerics.observers import make_observer
from ..numerics.quantize import fake_quantize
from ..numerics.scheme import Quant, Scheme
from ..report.findings import places

TOGETHER = "all experts of the block rounded together"
STACKED = "their inputs are not quantized"
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Unit:
    """Layers that are rounded together."""

    name: str
    block: int | None
    role: str
    layers: tuple[Layer, ...]

    @property
    def scheme(self) -> Scheme:
        """The scheme of its layers."""
        return self.layers[0].scheme

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def experts(self) -> bool:
        """Whether it is the experts of a block."""
        return _of_expert(self.layers[0])

    @property
    def note(self) -> str:
        """What a reader has to know."""
        stacked = self.layers[0].module is None and self.scheme.input is not None
        return "; ".join(filter(None, (TOGETHER if self.experts else "", STACKED if stacked else "")))


def _of_expert(layer: Layer) -> bool:
    return layer.module is None or _EXPERT.search(layer.name) is not None


def units(layers: Sequence[Layer]) -> list[Unit]:
    """Return what is rounded together, in the layers' order."""
    where = places([layer.name for layer in layers])
    together: dict[object, list[Layer]] = {}
    for layer in layers:
        role = where[layer.name][1]
        key = (layer.block, role, layer.scheme) if _of_expert(layer) else layer.name
        together.setdefault(key, []).append(layer)
    found = []
    for members in together.values():
        first = members[0]
        name = re.sub(r"\.\d+(\.\D+)$", r".*\1", first.name) if _of_expert(first) else first.name
        found.append(Unit(name, first.block, where[first.name][1], tuple(members)))
    return found


def precise(source: Source) -> Source:
    """Return the same model with a network that computes in float32; the checkpoint is shared."""
    config = deepcopy(source.config)
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        part.dtype = torch.float32
    return replace(source, given=config)


@dataclass(frozen=True)
class Rounded:
    """The rounded weights of a unit: checkpoint tensor -> float32 values, and what that cost."""

    weights: dict[str, Tensor]
    sqnr_db: float
    bits_per_weight: float


def rounded(source: Source, unit: Unit, device: torch.device) -> Rounded:
    """Round a unit's weights to nearest, from the checkpoint's own values."""
    weights: dict[str, Tensor] = {}
    signal = noise = bits = 0.0
    for layer in unit.layers:
        original = source.checkpoint.read(layer.tensor, device)
        quantized = round_weight(original, layer.scheme.weight)
        values = quantized.dequantize()
        signal += original.float().square().sum(dtype=torch.float64).item()
        noise += (original.float() - values).square().sum(dtype=torch.float64).item()
        bits += quantized.bits_per_weight * original.numel()
        weights[layer.tensor] = values
    sqnr = -10 * math.log10(noise / max(signal, 1e-300)) if noise else math.inf
    return Rounded(weights, sqnr, bits / unit.weights)


class InputRanges:
    """The static input scales of layers, from the inputs that the original model gives them."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._observer = str(options.get("observer") or "absmax")
        self._percent = float(options.get("percentile") or 99.99)
        self._seen: dict[str, InputStatistics] = {}

    def watch(self, layers: Sequence[Layer]) -> dict[str, Any]:
        """Return, for each linear whose scheme needs it, the function that observes its inputs."""
        watched = {}
        for layer in layers:
            given = layer.scheme.input
            if layer.module is None or given is None or not given.calibrated:
                continue
            statistics = InputStatistics(make_observer(self._observer, given.format, self._percent))
            self._seen[layer.module] = statistics
            watched[layer.module] = statistics.update
        return watched

    def scale(self, layer: Layer, device: torch.device) -> Tensor | None:
        """Return a layer's static scale ``[1, 1]``, or None where it is computed while running."""
        if layer.module is None or layer.module not in self._seen or layer.scheme.input is None:
            return None
        return self._seen[layer.module].scale(layer.scheme.input).to(device)


@contextmanager
def computing_with(
    source: Source, unit: Unit, weights: Mapping[str, Tensor], ranges: InputRanges, device: torch.device
) -> Iterator[None]:
    """Let the resident modules of `source` compute with a unit's rounded weights and inputs."""
    with quantized_inputs(source, unit.layers, ranges, device):
        kept = replace_weights(source, unit.layers, weights)
        try:
            yield
        finally:
            for path, value in kept.items():
                owner, leaf = _owner(source, path)
                owner._parameters[leaf] = value


@contextmanager
def quantized_inputs(
    source: Source, layers: Sequence[Layer], ranges: InputRanges, device: torch.device
) -> Iterator[None]:
    """Quantize the inputs of linears as their schemes say."""
    hooks = [
        source.model.get_submodule(layer.module).register_forward_pre_hook(
            _quantizer(layer.scheme.input, ranges.scale(layer, device))
        )
        for layer in layers
        if layer.module is not None and layer.scheme.input is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def replace_weights(
    source: Source, layers: Sequence[Layer], weights: Mapping[str, Tensor]
) -> dict[str, nn.Parameter]:
    """Put rounded weights into resident modules; return the parameters that were there (path -> parameter).

    A stack of experts is joined again from its matrices, so all of its layers that are rounded go in one call.
    """
    kept: dict[str, nn.Parameter] = {}
    checkpoint = source.checkpoint
    source.checkpoint = _Overlaid(checkpoint, weights)  # type: ignore[assignment]
    try:
        for name in dict.fromkeys(source.targets[layer.tensor].parameter for layer in layers):
            for path, value in source.parameter(name).items():
                owner, leaf = _owner(source, path)
                now = owner._parameters[leaf]
                assert now is not None and not now.is_meta, path
                kept[path] = now
                changed = value.to(now.device, now.dtype)
                owner._parameters[leaf] = nn.Parameter(changed, requires_grad=False)
    finally:
        source.checkpoint = checkpoint
    return kept


class _Overlaid:
    """A checkpoint in which some tensors have other values."""

    def __init__(self, checkpoint: Any, weights: Mapping[str, Tensor]) -> None:
        self._checkpoint, self._weights = checkpoint, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor, the changed value where there is one."""
        if name in self._weights:
            return self._weights[name].to(device)
        found: Tensor = self._checkpoint.read(name, device)
        return found.float() if found.is_floating_point() else found


def _owner(source: Source, path: str) -> tuple[nn.Module, str]:
    module, _, leaf = path.rpartition(".")
    return source.model.get_submodule(module), leaf


def _quantizer(quant: Quant, scale: Tensor | None) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize(args[0], quant, scale), *args[1:])

    return hook
