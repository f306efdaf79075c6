"""Layer 5: open a compressed folder again in transformers, on any machine.

The weights are dequantized to the model's own type and the linears' inputs pass through the same quantization
that an engine applies, so generation and perplexity measure the compressed model, at the speed of the original.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .export._cache import cache_quant
from .export._checkpoint import QuantizedCheckpoint, open_any
from .models.attention import States, Watch, module_path, watch
from .models.checkpoint import read_tensor
from .models.loading import Source
from .numerics.kv_cache import through_cache
from .numerics.quantize import fake_quantize
from .numerics.scheme import Quant


def load(
    reference: str | Path, *, device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> Any:
    """Open a model folder, compressed or not, as a transformers model ready for ``generate``.

    >>> model = load("tiny-lm")  # doctest: +SKIP
    """
    source = open_any(reference, trust_remote_code=trust_remote_code)
    model = source.materialize("", torch.device(device))
    model.tie_weights()  # type: ignore[operator]
    if isinstance(source.checkpoint, QuantizedCheckpoint):
        _quantize_inputs(model, source.targets, source.checkpoint, torch.device(device))
        _quantize_cache(model, source, source.checkpoint, torch.device(device))
    _set_generation(model, source.folder)
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


def _quantize_cache(
    model: nn.Module, source: Source, checkpoint: QuantizedCheckpoint, device: torch.device
) -> None:
    """Let attention read keys and values as a quantized cache returns them, the newest included."""
    quant = cache_quant(checkpoint.settings)
    stored = [name.removesuffix(".k_scale") for name in checkpoint.stored if name.endswith(".k_scale")]
    for name in stored if quant is not None else []:
        key, value = (
            read_tensor(checkpoint.stored[f"{name}.{role}_scale"]).to(device).float() for role in "kv"
        )
        assert quant is not None
        watch([model.get_submodule(module_path(source, name))], _cache(quant, key, value))


def _cache(quant: Quant, key_scale: Tensor, value_scale: Tensor) -> Watch:
    def through(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> States:
        return query, through_cache(key, key_scale, quant), through_cache(value, value_scale, quant)

    return through


def _set_generation(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
