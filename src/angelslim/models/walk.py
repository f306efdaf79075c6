"""The block stream: one decoder block in memory at a time, fed with its calibration inputs.

First a *skeleton* pass runs the model with its blocks replaced by recorders: only the embedding is loaded, and
each block's call arguments (rotary tables, masks, which differ between layer types) are noted per sample. Then
the blocks are walked: a block's weights are read from disk, the samples run through it, the method observes and
quantizes, the block is freed. Memory is one block plus the activations' budget, whatever the depth.

Samples run one by one at their own length, so no padding exists and none can enter a statistic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import ModelError
from ..numerics.error import Histogram, LayerRecord, error_of
from ..numerics.quantize import Quantized
from .activations import ActivationStore
from .loading import Source
from .select import Layer
from .structure import Group

Observe = Callable[[Tensor], None]
ObservePair = Callable[[Tensor, Tensor | None], None]


@dataclass(frozen=True)
class QuantizedLayer:
    """A method's result for one layer: its codes and scales, the static input scale if any, its record."""

    layer: Layer
    weight: Quantized
    input_scale: Tensor | None
    record: LayerRecord


@dataclass
class Block:
    """What a blockwise method works on: the layers of one block, and the means to run it.

    Without calibration data `samples` is 0 and only `weight` and `emit` may be used.
    """

    source: Source
    index: int | None
    layers: tuple[Layer, ...]
    groups: dict[str, Group]  # linear's module path -> its group
    device: torch.device
    samples: int = 0
    stream: BlockStream | None = None
    results: list[QuantizedLayer] = field(default_factory=list)
    advanced: bool = False

    def weight(self, layer: Layer) -> Tensor:
        """Return a layer's weight ``[out, in]``, refusing NaN and infinity."""
        if layer.module is not None and self.samples:
            weight: Tensor = self.source.model.get_submodule(layer.module).weight
        else:
            weight = self.source.checkpoint.read(layer.tensor).to(self.device)
        if not all(math.isfinite(value) for value in torch.stack(torch.aminmax(weight)).tolist()):
            raise ModelError(
                f"The weight {layer.tensor!r} holds NaN or infinity.",
                fix="The source model is damaged; restore this tensor or add the layer to ignore_layers.",
            )
        return weight

    def advance(self, observe: Mapping[str, Observe] | None = None) -> None:
        """Run all samples through the block as it is now and keep the outputs as the next block's inputs.

        `observe` maps module paths of linears to functions that receive each of their inputs ``[tokens, in]``.
        """
        assert self.stream is not None and self.index is not None
        self.stream.run(self.index, observe or {}, keep=True)
        self.advanced = True

    def collect(self, observe: Mapping[str, Observe]) -> None:
        """Run all samples through the block as it is now and keep nothing; `observe` is that of `advance`."""
        assert self.stream is not None and self.index is not None
        self.stream.run(self.index, observe, keep=False)

    def compare(self, observe: Mapping[str, ObservePair]) -> None:
        """Run all samples through the block as it is now, from their own inputs and from the original model's.

        `observe` gets both inputs of a linear ``[tokens, in]``; the second is None where the tokens of the two
        cannot be matched (an expert that was sent others). Only for methods that follow the original, which call
        it once, before they replace a weight.
        """
        assert self.stream is not None and self.index is not None
        self.stream.compare(self.index, observe)

    def replace(self, layer: Layer, weight: Tensor) -> None:
        """Let the block compute with another weight ``[out, in]`` from now on, in the model's own type."""
        assert layer.module is not None and self.samples
        module = self.source.model.get_submodule(layer.module)
        module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)  # type: ignore[arg-type]

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
        )
        self.results.append(QuantizedLayer(layer, weight, input_scale, record))


class BlockStream:
    """Walks the blocks of an opened model with calibration samples ``[1, tokens]`` of token ids.

    With `follow_original` each sample is stored twice: entry s passes through the blocks as a method leaves
    them, entry ``len(samples) + s`` through the original ones. Both are committed and resumed together.
    """

    def __init__(
        self,
        source: Source,
        samples: Sequence[Tensor],
        store: ActivationStore,
        device: torch.device,
        *,
        follow_original: bool = False,
    ) -> None:
        self.source, self.samples, self.store, self.device = source, list(samples), store, device
        self.blocks = source.structure.blocks
        self.entries = len(self.samples) * (2 if follow_original else 1)
        self._calls: list[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = []  # sample -> block -> call
        self._interned: dict[str, Tensor] = {}

    def prepare(self, first: int) -> None:
        """Run the skeleton; generation 0 is stored unless the walk continues at block `first` > 0."""
        for sample, ids in enumerate(self.samples):
            hidden, calls = self._record(ids)
            self._calls.append(calls)
            if first == 0:
                for entry in range(sample, self.entries, len(self.samples)):
                    self.store.put(0, entry, hidden)
        self.source.free("")

    @contextmanager
    def resident(self, index: int) -> Iterator[nn.Module]:
        """Hold one block's weights in memory."""
        path = self.blocks[index]
        try:
            yield self.source.materialize(path, self.device)
        finally:
            self.source.free(path)

    def run(self, index: int, observe: Mapping[str, Observe], *, keep: bool) -> None:
        """Run every sample through block `index`; `keep` stores the outputs as the next generation."""
        with self._observed(observe):
            for sample in range(len(self.samples)):
                output = self._forward(index, sample)
                if keep:
                    self._advance(index, sample, output)

    def compare(self, index: int, observe: Mapping[str, ObservePair]) -> None:
        """Run every sample from both of its inputs; the outputs of the original's are the next generation."""
        count = len(self.samples)
        assert self.entries == 2 * count, "the method does not say that it follows the original"
        seen: dict[str, Tensor] = {}
        with self._observed({path: partial(seen.__setitem__, path) for path in observe}):
            for sample, ids in enumerate(self.samples):
                self._forward(index, sample)
                inputs = dict(seen)
                seen.clear()
                self._advance(index, count + sample, self._forward(index, count + sample))
                for path, values in inputs.items():
                    original = seen.get(path)
                    # A whole number of rows per token: nothing was routed away, so rows belong together.
                    matched = original is not None and original.shape == values.shape
                    whole = values.shape[0] % ids.shape[1] == 0
                    observe[path](values, original if matched and whole else None)
                seen.clear()

    def _advance(self, index: int, entry: int, output: Tensor) -> None:
        self.store.put(index + 1, entry, output)
        self.store.drop(index, entry)

    def _forward(self, index: int, entry: int) -> Tensor:
        sample = entry % len(self.samples)
        module = self.source.model.get_submodule(self.blocks[index])
        args, kwargs = self._calls[sample][index]
        with torch.no_grad():
            output = module(self.store.get(index, entry).to(self.device), *args, **kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if not hidden.isfinite().all():
            raise ModelError(
                f"Block {index} ({self.blocks[index]}) gives NaN or infinity on sample {sample}.",
                fix="The source model is damaged or overflows in its type; try model.torch_dtype=float32.",
            )
        return hidden

    @contextmanager
    def _observed(self, observe: Mapping[str, Observe]) -> Iterator[None]:
        hooks = [
            self.source.model.get_submodule(path).register_forward_pre_hook(_observer_hook(function))
            for path, function in observe.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, ids: Tensor) -> tuple[Tensor, dict[int, tuple[tuple[Any, ...], dict[str, Any]]]]:
        model = self.source.model
        calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        first: list[Tensor] = []
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        modules = [model.get_submodule(path) for path in self.blocks]

        def recorder(index: int) -> Callable[..., Any]:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                if index == 0:
                    first.append(hidden)
                calls[index] = (self._intern(args, seen), self._intern(kwargs, seen))
                if index == len(modules) - 1:
                    raise _Recorded
                return (hidden,) if self.source.structure.tuple_outputs else hidden

            return forward

        hooks = self._fill_on_demand()
        for index, module in enumerate(modules):
            module.forward = recorder(index)
        try:
            with torch.no_grad():
                model(input_ids=ids.to(self.device), use_cache=False)
        except _Recorded:
            pass
        finally:
            for module in modules:
                del module.forward
            for hook in hooks:
                hook.remove()
        return first[0], calls

    def _fill_on_demand(self) -> list[Any]:
        """Let modules outside the blocks read their weights when first called (the embedding, mostly)."""
        handles = []
        for name, module in self.source.model.named_modules():
            outside = self.source.structure.block_of(name) is None and name not in self.blocks
            if outside and any(value.is_meta for value in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(self._filler(name)))
        return handles

    def _filler(self, name: str) -> Callable[..., None]:
        def fill(_module: nn.Module, _args: Any) -> None:
            self.source.materialize(name, self.device)

        return fill

    def _intern(self, value: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """Share equal tensors between samples and blocks: rotary tables are stored once a length."""
        if isinstance(value, Tensor):
            if id(value) not in seen:
                raw = value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
                digest = hashlib.sha1(raw, usedforsecurity=False).hexdigest()
                shared = self._interned.setdefault(f"{value.shape}{value.dtype}{digest}", value)
                seen[id(value)] = (value, shared)  # holding the value keeps its id from being used again
            return seen[id(value)][1]
        if isinstance(value, tuple):
            return tuple(self._intern(item, seen) for item in value)
        if isinstance(value, dict):
            return {key: self._intern(item, seen) for key, item in value.items()}
        return value


class _Recorded(Exception):
    """Raised when the last block has been recorded."""


def _observer_hook(function: Observe) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        function(args[0].detach().reshape(-1, args[0].shape[-1]))

    return hook
