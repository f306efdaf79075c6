"""Layer 6: open a compressed folder again and look for what engines would trip over. Every run ends with it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .base.console import bar
from .base.errors import ModelError
from .export._checkpoint import QuantizedCheckpoint, open_any
from .export.base import FILES
from .models.loading import Source

LARGEST_CODE = 512.0  # above every code: 448 in E4M3, 255 between an INT8 code and its zero point


def open_compressed(folder: Path) -> tuple[Source, QuantizedCheckpoint]:
    """Open a compressed folder; a plain model is a `ModelError`."""
    source = open_any(folder)
    if not isinstance(source.checkpoint, QuantizedCheckpoint):
        raise ModelError(f"{folder} is not quantized.", fix="Compress it first: angelslim run METHOD MODEL.")
    return source, source.checkpoint


def check(folder: Path, *, plain: bool = False) -> int:
    """Unpack every layer of a compressed folder or file and look for what engines would trip over.

    Shapes must be those of the model that config.json describes; codes and scales must agree in shape; scales must
    be finite and positive, or of symmetric integers at least not zero; decoded weights, and those in full precision,
    finite. Returns how many quantized layers there are. A `plain` folder has none, and only finite tensors.
    """
    if folder.is_file() and folder.suffix[1:] in FILES:
        return FILES.get(folder.suffix[1:]).check(folder)
    if plain:
        return _check_plain(folder)
    source, checkpoint = open_compressed(folder)
    source.check()
    with bar("checking", len(checkpoint.tensors)) as progress:
        for name in checkpoint.tensors:
            layer = name.removesuffix(".weight")
            if layer in checkpoint.parts and not _sound(checkpoint, layer):
                raise ModelError(
                    f"{folder}: layer {layer!r} has a scale or weight that is not finite.",
                    fix="Compress the model again.",
                )
            if layer not in checkpoint.parts and not _finite(checkpoint.read(name)):
                raise ModelError(
                    f"{folder}: {name!r}, which is not quantized, holds NaN or infinity.",
                    fix="The original is likely damaged: restore this tensor there and compress it again.",
                )
            progress.advance()
    return len(checkpoint.parts)


def _check_plain(folder: Path) -> int:
    source = open_any(folder)
    source.check()
    for name in source.checkpoint.tensors:
        if not _finite(source.checkpoint.read(name)):
            raise ModelError(
                f"{folder}: {name!r} holds NaN or infinity.",
                fix="The source was damaged, or a training diverged: try a lower rate.",
            )
    return 0


def _sound(checkpoint: QuantizedCheckpoint, name: str) -> bool:
    """Say whether a layer decodes to finite numbers, without decoding it: codes and their largest product are."""
    layer = checkpoint.restore(name)
    scale, static = layer.weight.scale.float(), layer.input_scale
    signed = layer.weight.quant.format.kind == "int" and layer.weight.quant.symmetric
    sound = _finite(scale) and bool(((scale != 0) if signed else (scale > 0)).all())
    sound = sound and (static is None or (_finite(static) and bool((static.float() > 0).all())))
    return sound and _finite(scale.abs().amax() * LARGEST_CODE) and _finite(layer.weight.codes)


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype == torch.float8_e4m3fn:  # no infinities, and one NaN of each sign: all bits set
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    if tensor.itemsize == 1:
        tensor = tensor.float()
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
