"""Layer 7: rewrite a compressed folder in another checkpoint format that holds the same numbers, bit for bit.

Codes and scales are read layer by layer and written again; nothing is rounded, so the two folders dequantize to
identical weights. A format that cannot hold the scheme is refused with the reason.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base.console import bar
from .base.errors import ModelError, UserError
from .export.base import choose
from .job import KEPT_FILES
from .models.checkpoint import UnitWriter, read_tensor, write_atomically
from .models.loading import load_config
from .reopen import QuantizedCheckpoint, open_quantized

MAX_SHARD = 5 * 10**9
LAYERS_PER_UNIT = 32


def convert(folder: Path, wanted: str, out: Path) -> None:
    """Write the compressed model in `folder` to `out` in the format called `wanted`."""
    if out.exists():
        raise UserError(f"{out} already exists.", fix="Choose another --out.")
    checkpoint, config = open_compressed(folder)
    _, exporter = choose(set(checkpoint.schemes.values()), wanted)
    settings = config["quantization_config"]
    kept = settings.get("ignore") or settings.get("modules_to_not_convert") or []
    config["quantization_config"] = exporter.config(checkpoint.schemes, kept)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    result = partial / "result"
    result.mkdir(parents=True)
    writer = UnitWriter(partial / "units")
    plain = [
        name
        for name in checkpoint.stored
        if name.rpartition(".")[0] not in checkpoint.parts or name.endswith(".bias")
    ]
    names = list(checkpoint.parts)
    units = []
    with bar("converting", len(names)) as progress:
        for start in range(0, len(names), LAYERS_PER_UNIT):
            tensors: dict[str, Tensor] = {}
            for name in names[start : start + LAYERS_PER_UNIT]:
                layer = checkpoint.restore(name)
                tensors |= exporter.tensors(name, layer.weight, layer.scheme, layer.input_scale)
                progress.advance()
            units.append(f"layers-{start:06d}")
            writer.write(units[-1], tensors)
    for index, name in enumerate(plain):
        units.append(f"plain-{index:06d}")
        writer.write(units[-1], {name: read_tensor(checkpoint.stored[name])})
    for pattern in KEPT_FILES:
        for file in folder.glob(pattern):
            if file.name != "model.safetensors.index.json":
                shutil.copyfile(file, result / file.name)
    write_atomically(result / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    writer.finish(units, result, MAX_SHARD)
    result.rename(out)
    shutil.rmtree(partial)


def open_compressed(folder: Path) -> tuple[QuantizedCheckpoint, dict[str, Any]]:
    """Open a compressed folder; a plain model is a `ModelError`."""
    config = load_config(folder)
    if getattr(config, "quantization_config", None) is None:
        raise ModelError(f"{folder} is not quantized.", fix="Compress it first: angelslim run METHOD MODEL.")
    return open_quantized(folder, config), json.loads((folder / "config.json").read_text("utf-8"))


def check(folder: Path) -> int:
    """Decode every layer of a compressed folder and look for what engines would trip over; return the count.

    Codes and scales must agree in shape, scales must be finite and positive, decoded weights finite.
    """
    checkpoint, _ = open_compressed(folder)
    with bar("checking", len(checkpoint.parts)) as progress:
        for name in checkpoint.parts:
            layer = checkpoint.restore(name)
            scales = [layer.weight.scale, *([layer.input_scale] if layer.input_scale is not None else [])]
            bad = any(not torch.isfinite(s.float()).all() or (s.float() <= 0).any() for s in scales)
            if bad or not layer.weight.dequantize().isfinite().all():
                raise ModelError(
                    f"{folder}: layer {name!r} has a scale or weight that is not finite.",
                    fix="Compress the model again.",
                )
            progress.advance()
    return len(checkpoint.parts)
