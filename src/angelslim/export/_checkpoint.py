"""A compressed folder seen as an ordinary one: tensors are decoded when they are read.

A `QuantizedCheckpoint` lists full-precision weights where the folder holds codes and scales, so whatever opens a
model opens a compressed one too: evaluation, and compression of a model that was published in FP8. Nothing is
decoded before it is asked for, one matrix at a time; an expert of a fused stack is a matrix like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import ModelError
from ..models.checkpoint import Checkpoint, TensorInfo, read_tensor
from ..models.loading import (
    Source,
    load_config,
    open_plain,
    open_remembered,
    open_with,
    raw_config,
    raw_dtype,
    resolve,
    torch_dtype,
)
from ..numerics.quantize import Quantized, tile_of
from ..numerics.scheme import Quant, Scheme
from .base import FORMATS, Exporter, Restored

# Codes mean nothing without their scales: a tensor of these types that no layer claims is a layer in disguise.
CODES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.int8})


class QuantizedCheckpoint(Checkpoint):
    """The tensors of a compressed folder, decoded when read.

    `stored` are the tensors as they lie in the files, `tensors` those that a full-precision model would have,
    `parts` the stored tensors of each quantized layer, `schemes` how each is quantized.
    """

    def __init__(
        self, folder: Path, exporter: Exporter, settings: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        super().__init__(folder)
        self.exporter, self.settings, self.dtype = exporter, settings, dtype
        self.stored = dict(self.tensors)
        suffix = f".{exporter.scale_name}"
        names = {tensor.removesuffix(suffix) for tensor in self.stored if tensor.endswith(suffix)}
        self.parts: dict[str, list[str]] = {name: [] for name in sorted(names)}
        if not names:
            raise ModelError(
                f"{folder}: config.json declares {exporter.method} weights, and no tensor *{suffix} is there.",
                fix="Use the config.json that belongs to these weights.",
            )
        self.schemes: dict[str, Scheme] = exporter.schemes(settings, list(self.parts))
        for tensor in self.stored:
            name, _, leaf = tensor.rpartition(".")
            if name in names and leaf != "bias":
                self.parts[name].append(tensor)
                del self.tensors[tensor]
        self._refuse_bare_codes()
        for name in self.parts:
            self.tensors[f"{name}.weight"] = self._info(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(info.nbytes for info in self.stored.values())

    @property
    def decoded(self) -> bool:
        """Always: the folder holds codes."""
        return True

    def _refuse_bare_codes(self) -> None:
        bare = [info.name for info in self.tensors.values() if info.dtype in CODES and len(info.shape) > 1]
        if bare:
            raise ModelError(
                f"{self.folder}: {bare[0]!r} and {len(bare) - 1} more hold codes without a scale that is known here.",
                fix="Load the folder in its own engine, or start from another version of the model.",
            )

    def _info(self, name: str) -> TensorInfo:
        parts = {part.rpartition(".")[2]: self.stored[part] for part in self.parts[name]}
        try:
            if "weight_shape" in parts:
                shape = tuple(int(size) for size in read_tensor(parts["weight_shape"]))
            else:
                shapes = {leaf: info.shape for leaf, info in parts.items()}
                shape = self.exporter.shape(shapes, self.schemes[name])
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"{self.folder}: layer {name!r} has a scale and no weight.", fix="Copy the folder again."
            ) from error
        file = parts[self.exporter.scale_name].file
        return TensorInfo(f"{name}.weight", self.dtype, shape, file, 0, prod(shape) * self.dtype.itemsize)

    def restore(self, name: str, device: torch.device | str = "cpu") -> Restored:
        """Decode one quantized layer to its codes and scales; parts that do not fit are a `ModelError`."""
        tensors = {tensor: self.fetch(self.stored[tensor]).to(device) for tensor in self.parts[name]}
        try:
            restored = self.exporter.restore(name, tensors, self.schemes[name])
        except (KeyError, RuntimeError) as error:
            raise self._misfit(name) from error
        assert restored is not None, name
        weight = restored.weight
        rows, columns = tile_of(weight.quant.granularity, (weight.codes.shape[0], weight.codes.shape[1]))
        if weight.scale.shape != (-(-weight.codes.shape[0] // rows), -(-weight.codes.shape[1] // columns)):
            raise self._misfit(name)
        return restored

    def _misfit(self, name: str) -> ModelError:
        parts = ", ".join(
            f"{part.rpartition('.')[2]} {list(self.stored[part].shape)}" for part in self.parts[name]
        )
        return ModelError(
            f"{self.folder}: the parts of layer {name!r} do not fit together ({parts}).",
            fix="Copy the folder again, or compress the model again.",
        )

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor; a quantized weight is dequantized to the model's type."""
        layer = name.removesuffix(".weight")
        if layer in self.parts and name != layer:
            return self.restore(layer, device).weight.dequantize().to(self.dtype)
        return super().read(name, device)

    def published(self, name: str, quant: Quant, device: torch.device | str = "cpu") -> Quantized | None:
        """Return a layer's own codes and scales where it is quantized as `quant` says."""
        layer = name.removesuffix(".weight")
        if layer not in self.parts or self.schemes[layer].weight != quant:
            return None
        weight = self.restore(layer, device).weight
        return replace(weight, scale=weight.scale.float())

    def sources(self, name: str) -> list[TensorInfo]:
        """Return the stored parts of a layer, or the tensor itself."""
        layer = name.removesuffix(".weight")
        if layer in self.parts and name != layer:
            return [self.stored[part] for part in self.parts[layer]]
        return super().sources(name)


def open_quantized(folder: Path, config: Any) -> QuantizedCheckpoint:
    """Open a compressed folder with the exporter that its config.json names."""
    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    return _open_compressed(folder, settings, torch_dtype(config))


def _open_compressed(folder: Path, settings: dict[str, Any], dtype: torch.dtype) -> QuantizedCheckpoint:
    for name in FORMATS:
        exporter = FORMATS.get(name)
        if exporter.reads(settings):
            return QuantizedCheckpoint(folder, exporter, settings, dtype)
    raise ModelError(
        f"{folder} uses the format {settings.get('quant_method')!r}, which cannot be read here.",
        fix="Load it in its own engine.",
    )


def open_any(reference: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Open a model by folder, hub id or built-in name; a compressed one is decoded as it is read."""
    folder = resolve(reference)
    settings, checkpoint = raw_config(folder), None
    quantized = settings.pop("quantization_config", None)
    if settings and list(folder.glob("*.safetensors")):
        dtype = raw_dtype(settings)
        checkpoint = _open_compressed(folder, quantized, dtype) if quantized else Checkpoint(folder)
        known = open_remembered(str(reference), folder, settings, checkpoint)
        if known is not None:
            return known
    config = load_config(folder, trust_remote_code)
    if getattr(config, "quantization_config", None) is None:
        return open_plain(str(reference), folder, config, checkpoint or Checkpoint(folder))
    checkpoint = open_quantized(folder, config)
    del config.quantization_config
    return open_with(str(reference), folder, config, checkpoint)
