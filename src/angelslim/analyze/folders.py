"""One folder or two, read layer by layer: a compressed model, and the original it was made from.

Two folders that do not belong together are refused before anything is compared, with one line that says how they
differ. Only one layer, or one pair, is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import ModelError
from ..export._checkpoint import QuantizedCheckpoint, open_quantized
from ..export.base import Restored
from ..models.checkpoint import Checkpoint
from ..models.loading import load_config, resolve
from ..numerics.analysis import is_finite

TIED = ("lm_head.weight",)  # a folder may leave it out where the embedding serves for both


@dataclass(frozen=True)
class Opened:
    """A model folder: its configuration and its tensors, decoded when read if it is compressed."""

    name: str  # as the user named it
    folder: Path
    config: Any
    checkpoint: Checkpoint

    @property
    def quantized(self) -> QuantizedCheckpoint | None:
        """The checkpoint if it is compressed."""
        return self.checkpoint if isinstance(self.checkpoint, QuantizedCheckpoint) else None

    @property
    def format(self) -> str:
        """The checkpoint's format in one word."""
        quantized = self.quantized
        return str(self.config.quantization_config["quant_method"]) if quantized else "full precision"

    def exact(self, name: str) -> Tensor:
        """Read one tensor; a quantized weight as float32, not rounded to the model's type."""
        layer = name.removesuffix(".weight")
        if self.quantized is not None and layer != name and layer in self.quantized.parts:
            return self.quantized.restore(layer).weight.dequantize()
        return self.checkpoint.read(name)


def open_folder(reference: str | Path) -> Opened:
    """Open a model folder, compressed or not; reads headers only."""
    folder = resolve(reference)
    config = load_config(folder)
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return Opened(str(reference), folder, config, Checkpoint(folder))
    if not isinstance(settings, dict):
        config.quantization_config = settings.to_dict()
    return Opened(str(reference), folder, config, open_quantized(folder, config))


@dataclass(frozen=True)
class Matrix:
    """One layer: its stored form if it is quantized, its weight in the original if one was given."""

    name: str
    stored: Restored | None
    restored: Tensor  # what the stored form stands for; the weight itself of a layer in full precision
    original: Tensor | None


def matrices(subject: Opened) -> list[str]:
    """Return the layers to look at: the quantized ones, or every matrix of a model in full precision."""
    if subject.quantized is not None:
        return list(subject.quantized.parts)
    return [
        name.removesuffix(".weight")
        for name, info in subject.checkpoint.tensors.items()
        if len(info.shape) == 2 and name.endswith(".weight")
    ]


def read(subject: Opened, name: str, original: Opened | None) -> Matrix:
    """Read one layer, refusing scales and weights that are not finite."""
    stored = subject.quantized.restore(name) if subject.quantized is not None else None
    if stored is not None:
        _check_scales(subject, name, stored)
        restored = stored.weight.dequantize()
    else:
        restored = subject.checkpoint.read(f"{name}.weight")
    _check_finite(subject, name, restored)
    exact = original.exact(f"{name}.weight") if original is not None else None
    if original is not None and exact is not None:
        _check_finite(original, name, exact)
    return Matrix(name, stored, restored, exact)


def _check_scales(opened: Opened, name: str, stored: Restored) -> None:
    for what, scale in (("weight", stored.weight.scale), ("input", stored.input_scale)):
        if scale is None:
            continue
        values = scale.float()
        if not values.isfinite().all() or bool((values < 0).any()):
            raise ModelError(
                f"{opened.folder}: layer {name!r} has a {what} scale that is NaN, infinite or negative.",
                fix="Compress the model again; `angelslim export --check` checks a folder.",
            )


def _check_finite(opened: Opened, name: str, weight: Tensor) -> None:
    if not is_finite(weight):
        raise ModelError(
            f"{opened.folder}: the weight of {name!r} holds NaN or infinity.",
            fix="Copy the folder again, or make it again.",
        )


def check_pair(original: Opened, compressed: Opened) -> None:
    """Refuse two folders that are not an original and its compressed copy."""
    if compressed.quantized is None:
        swapped = original.quantized is not None
        raise ModelError(
            f"{compressed.folder} is not quantized.",
            fix="The original comes first: swap the two." if swapped else "Name a compressed folder second.",
        )
    types = [each.config.model_type for each in (original, compressed)]
    if types[0] != types[1]:
        raise ModelError(
            f"{original.name} is a {types[0]} and {compressed.name} a {types[1]}.",
            fix="Compare a model with its own compressed copy.",
        )
    here, there = compressed.checkpoint.tensors, original.checkpoint.tensors
    wanted = {name: info.shape for name, info in there.items() if len(info.shape) >= 2 and name not in TIED}
    names = [f"{name}.weight" for name in compressed.quantized.parts]
    _refuse_absent([name for name in names if name not in there], compressed, original)
    _refuse_absent([name for name in wanted if name not in here], original, compressed)
    other = [name for name in wanted if tuple(here[name].shape) != tuple(wanted[name])]
    if other:
        raise ModelError(
            f"{len(other)} tensors have other shapes in {compressed.name}, such as {other[0]!r}: "
            f"{list(here[other[0]].shape)} instead of {list(wanted[other[0]])}.",
            fix="Compare a model with its own compressed copy.",
        )


def _refuse_absent(names: Sequence[str], holder: Opened, other: Opened) -> None:
    if names:
        raise ModelError(
            f"{other.name} lacks {len(names)} matrices of {holder.name}, such as {names[0]!r}.",
            fix="Compare a model with its own compressed copy, and check that both folders are complete.",
        )


def changed(original: Opened, compressed: Opened) -> Iterator[str]:
    """Yield the tensors that were not quantized and still differ: a method moved scales into them."""
    quantized = compressed.quantized
    assert quantized is not None
    for name in quantized.tensors:
        if name.removesuffix(".weight") in quantized.parts or name not in original.checkpoint.tensors:
            continue
        now, then = quantized.read(name), original.exact(name)
        if now.shape != then.shape or not torch.equal(now, then.to(now.dtype)):
            yield name
