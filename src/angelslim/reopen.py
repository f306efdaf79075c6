"""Layer 5: open a compressed folder again in transformers, on any machine.

The weights are dequantized to the model's own type and the linears' inputs pass through the same quantization
that an engine applies, so generation and perplexity measure the compressed model, at the speed of the original.
A `QuantizedCheckpoint` looks like an ordinary checkpoint whose tensors happen to be decoded when read: the same
code that opens any model opens it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base.errors import ModelError
from .export.base import FORMATS, Exporter, Restored
from .models.checkpoint import Checkpoint, TensorInfo, read_tensor
from .models.loading import load_config, open_with, resolve, torch_dtype
from .numerics.quantize import fake_quantize, tile_of
from .numerics.scheme import Quant, Scheme


class QuantizedCheckpoint(Checkpoint):
    """The tensors of a compressed folder, decoded when read."""

    def __init__(
        self, folder: Path, exporter: Exporter, settings: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        super().__init__(folder)
        self.exporter, self.dtype = exporter, dtype
        self.stored = dict(self.tensors)
        suffix = f".{exporter.scale_name}"
        names = {tensor.removesuffix(suffix) for tensor in self.stored if tensor.endswith(suffix)}
        self.parts: dict[str, list[str]] = {name: [] for name in sorted(names)}
        self.schemes: dict[str, Scheme] = exporter.schemes(settings, list(self.parts))
        for tensor in self.stored:
            name, _, leaf = tensor.rpartition(".")
            if name in names and leaf != "bias":
                self.parts[name].append(tensor)
                del self.tensors[tensor]
        for name in self.parts:
            self.tensors[f"{name}.weight"] = self._info(name)

    def _info(self, name: str) -> TensorInfo:
        codes, shape = self.stored.get(f"{name}.weight"), self.stored.get(f"{name}.weight_shape")
        if codes is not None:
            return TensorInfo(codes.name, self.dtype, codes.shape, codes.file, 0, 0)
        if shape is None:
            raise ModelError(
                f"{self.folder}: layer {name!r} has a scale and no weight.", fix="Copy the folder again."
            )
        sizes = tuple(int(size) for size in read_tensor(shape))
        return TensorInfo(f"{name}.weight", self.dtype, sizes, shape.file, 0, 0)

    def restore(self, name: str) -> Restored:
        """Decode one quantized layer to its codes and scales; parts that do not fit are a `ModelError`."""
        tensors = {tensor: read_tensor(self.stored[tensor]) for tensor in self.parts[name]}
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

    def read(self, name: str) -> Tensor:
        """Read one tensor; a quantized weight is dequantized to the model's type."""
        layer = name.removesuffix(".weight")
        if layer in self.parts and name != layer:
            return self.restore(layer).weight.dequantize().to(self.dtype)
        return super().read(name)


def open_quantized(folder: Path, config: Any) -> QuantizedCheckpoint:
    """Open a compressed folder with the exporter that its config.json names."""
    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method")
    for name in FORMATS:
        exporter = FORMATS.get(name)
        if exporter.method == method:
            return QuantizedCheckpoint(folder, exporter, settings, torch_dtype(config))
    raise ModelError(
        f"{folder} uses the format {method!r}, which cannot be read here.", fix="Load it in its own engine."
    )


def load(
    reference: str | Path, *, device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> Any:
    """Open a model folder, compressed or not, as a transformers model ready for ``generate``.

    >>> model = load("tiny-lm")  # doctest: +SKIP
    """
    folder = resolve(reference)
    config = load_config(folder, trust_remote_code)
    quantized = getattr(config, "quantization_config", None) is not None
    checkpoint = open_quantized(folder, config) if quantized else Checkpoint(folder)
    if quantized:
        del config.quantization_config
    source = open_with(str(reference), folder, config, checkpoint)
    model = source.materialize("", torch.device(device))
    model.tie_weights()  # type: ignore[operator]
    if isinstance(checkpoint, QuantizedCheckpoint):
        _quantize_inputs(model, source.targets, checkpoint, torch.device(device))
    _set_generation(model, folder)
    return model.eval()


def _quantize_inputs(
    model: nn.Module, targets: dict[str, Any], checkpoint: QuantizedCheckpoint, device: torch.device
) -> None:
    for name, scheme in checkpoint.schemes.items():
        if scheme.input is None:
            continue
        target = targets[f"{name}.weight"]
        module = model.get_submodule(target.parameter.rpartition(".")[0])
        if not isinstance(module, nn.Linear):
            continue  # one expert of a fused stack has no input of its own to hook
        stored = checkpoint.restore(name).input_scale if scheme.needs_data else None
        scale = None if stored is None else stored.to(device).reshape(1, 1)
        module.register_forward_pre_hook(_quantizer(scheme.input, scale))


def _quantizer(quant: Quant, scale: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize(args[0], quant, scale), *args[1:])

    return hook


def _set_generation(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
