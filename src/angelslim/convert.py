"""Layer 7: rewrite a compressed folder in another checkpoint format that holds the same numbers, bit for bit.

Codes and scales are read layer by layer and written again; nothing is rounded, and each layer is read back from what
was made of it before it is written, so the two folders dequantize to identical weights. A format that cannot hold
the numbers is refused with the reason, and leaves nothing behind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from .base.console import bar
from .base.errors import ConfigError, ResourceError, SchemeError, UserError, did_you_mean
from .check import open_compressed
from .export._checkpoint import QuantizedCheckpoint
from .export._same import check_equal, respelled, suited
from .export.base import FILES, FORMATS, PREFERRED, Exporter, Restored, refusal
from .job import KEPT_FILES, NEVER_COPIED
from .models.checkpoint import UnitWriter, read_tensor, write_atomically
from .models.loading import Source
from .models.select import kept_matrices
from .numerics.scheme import Scheme

MAX_SHARD = 5 * 10**9
LAYERS_PER_UNIT = 32


def convert(folder: Path, wanted: str, out: Path) -> None:
    """Write the compressed model in `folder`, or in one file, to `out` in the format called `wanted`.

    ``gguf:tq1_0`` asks a file format for one of its own types.
    """
    if out.exists():
        raise UserError(f"{out} already exists.", fix="Choose another --out.")
    name, _, kind = wanted.replace("-", "_").partition(":")
    if name not in FILES and name not in FORMATS:
        raise ConfigError(f"Unknown format {wanted!r}.", fix=did_you_mean(name, [*FORMATS, *FILES]))
    try:
        if folder.is_file() and folder.suffix[1:] in FILES:
            _unpacked(folder, name, out)
            return
        source, checkpoint = open_compressed(folder)
        if name in FILES:
            FILES.get(name).write(source, out, kind)
        else:
            _rewrite(source, checkpoint, wanted, out)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"Writing to {out} failed ({getattr(error, 'strerror', None) or error}).",
            fix="Free some disk space or choose another --out.",
        ) from error


def _unpacked(file: Path, name: str, out: Path) -> None:
    """Write a model that is one file as a folder, and that in the wanted format."""
    between = out.with_name(out.name + ".unpacked")
    shutil.rmtree(between, ignore_errors=True)
    try:
        FILES.get(file.suffix[1:]).unpack(file, between)
        if name == PREFERRED:
            between.rename(out)
        else:
            convert(between, name, out)
    finally:
        shutil.rmtree(between, ignore_errors=True)


def _rewrite(source: Source, checkpoint: QuantizedCheckpoint, wanted: str, out: Path) -> None:
    """Write a folder in another format; it appears under its name when it is complete."""
    folder, exporter = source.folder, FORMATS.get(wanted.replace("-", "_"))
    schemes = {layer: suited(scheme, exporter) for layer, scheme in checkpoint.schemes.items()}
    shapes = {layer: _shape(checkpoint, layer) for layer in schemes}
    if reason := refusal(exporter, schemes, shapes):
        raise SchemeError(
            f"Format {wanted!r} cannot hold {reason}.",
            fix="Choose another format, or compress the original model again with quantization.format set to this one.",
        )
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = _settings(source, checkpoint, exporter, schemes)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        result = partial / "result"
        result.mkdir(parents=True)
        writer = UnitWriter(partial / "units")
        units = [*_write_layers(checkpoint, exporter, schemes, writer), *_write_plain(checkpoint, writer)]
        for pattern in KEPT_FILES:
            for file in folder.glob(pattern):
                if file.name not in NEVER_COPIED:
                    shutil.copyfile(file, result / file.name)
        write_atomically(result / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        writer.finish(units, result, MAX_SHARD)
        result.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _shape(checkpoint: QuantizedCheckpoint, layer: str) -> tuple[int, int]:
    rows, columns = checkpoint.tensors[f"{layer}.weight"].shape
    return rows, columns


def _settings(
    source: Source, checkpoint: QuantizedCheckpoint, exporter: Exporter, schemes: Mapping[str, Scheme]
) -> dict[str, Any]:
    """Return the new ``quantization_config``; the layers left alone are found in the model, not in the old one."""
    targets = (source.targets.get(f"{name}.weight") for name in schemes)
    modules = {target.parameter.removesuffix(".weight") for target in targets if target is not None}
    settings = exporter.config(schemes, kept_matrices(source, modules | schemes.keys()))
    cache = checkpoint.settings.get("kv_cache_scheme")
    if cache and "kv_cache_scheme" not in settings:
        raise SchemeError(
            f"The format cannot hold the scales of the KV cache in {checkpoint.folder}.",
            fix="Use --format compressed_tensors.",
        )
    return settings | ({"kv_cache_scheme": cache} if cache else {})


def _write_layers(
    checkpoint: QuantizedCheckpoint, exporter: Exporter, schemes: Mapping[str, Scheme], writer: UnitWriter
) -> list[str]:
    """Rewrite the quantized layers, some at a time; return the units."""
    names, units = list(schemes), []
    with bar("converting", len(names)) as progress:
        for start in range(0, len(names), LAYERS_PER_UNIT):
            tensors: dict[str, Tensor] = {}
            for name in names[start : start + LAYERS_PER_UNIT]:
                layer, scheme = checkpoint.restore(name), schemes[name]
                weight = respelled(layer.weight, scheme.weight, name)
                made = exporter.tensors(name, weight, scheme, layer.input_scale)
                check_equal(
                    exporter.restore(name, made, scheme), Restored(weight, scheme, layer.input_scale), name
                )
                tensors |= made
                progress.advance()
            units.append(f"layers-{start:06d}")
            writer.write(units[-1], tensors)
    return units


def _write_plain(checkpoint: QuantizedCheckpoint, writer: UnitWriter) -> list[str]:
    """Copy the tensors that belong to no quantized layer; return the units."""
    parts = {part for parts in checkpoint.parts.values() for part in parts}
    units = []
    for index, (name, info) in enumerate(checkpoint.stored.items()):
        if name not in parts:
            units.append(f"plain-{index:06d}")
            writer.write(units[-1], {name: read_tensor(info)})
    return units
