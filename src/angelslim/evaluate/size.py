"""What a checkpoint weighs: bytes of its weight files, parameters, bits per parameter.

Bits per parameter divide *all* stored bytes (embeddings, norms, scales, headers) by the parameters of the
model, so the figure is honest about what was left in 16 bits; a scheme's bits per weight look only at the
layers that were quantized.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..base.errors import DataError, ModelError
from ..models.checkpoint import read_header
from .base import Score

SUFFIXES = (".safetensors", ".gguf")
MEGABYTE = 1_000_000


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder, or the file itself for a single-file format."""
    if folder.is_file() and folder.suffix in SUFFIXES:
        return [folder]
    files = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise ModelError(
            f"No weight files ({', '.join(SUFFIXES)}) in {str(folder)!r}.",
            fix="Give the folder of a saved model.",
        )
    return files


def weight_bytes(folder: Path) -> int:
    """Return the bytes of the weights on disk."""
    return sum(path.stat().st_size for path in weight_files(folder))


def count_parameters(folder: Path) -> int:
    """Count the elements stored in an *unquantized* safetensors checkpoint, from its headers alone.

    A packed checkpoint holds several weights in one stored integer, so there the count has to come from the
    original model: such a folder is refused.
    """
    config = folder / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text("utf-8")):
        raise DataError(
            "The parameters of a quantized checkpoint cannot be counted from its stored tensors.",
            where=str(folder),
            fix="Give the number of parameters of the original model.",
        )
    total = 0
    for path in weight_files(folder):
        for entry in read_header(path)[0].values():
            count = 1
            for length in entry["shape"]:
                count *= length
            total += count
    return total


def size_scores(folder: Path, parameters: int | None = None) -> list[Score]:
    """Return ``size`` (MB, one million bytes), ``parameters`` and ``bits/parameter`` of a saved model."""
    parameters = count_parameters(folder) if parameters is None else parameters
    if parameters < 1:
        raise DataError(f"The number of parameters is {parameters}.", fix="Give a positive number.")
    stored = weight_bytes(folder)
    return [
        Score("size", stored / MEGABYTE, "MB", "lower"),
        Score("parameters", float(parameters), "", "lower"),
        Score("bits/parameter", 8 * stored / parameters, "bits", "lower"),
    ]
