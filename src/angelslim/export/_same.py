"""The same numbers under another scheme: what lets formats exchange weights without rounding.

A symmetric INT4 weight is an asymmetric one whose zero points are all 0; one group of scales is several smaller
groups with equal ones. Nothing here rounds: what a scheme cannot say exactly is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..base.errors import SchemeError
from ..numerics.quantize import Quantized
from ..numerics.scheme import Quant, Scheme
from .base import Exporter, Restored


def spellings(scheme: Scheme) -> Iterator[Scheme]:
    """Yield the schemes under which weights of `scheme` may be written down, itself first."""
    yield scheme
    free = replace(scheme, weight=replace(scheme.weight, scale="free"))
    if free != scheme and scheme.weight.scale == "fp8_channel":  # its products are plain numbers to others
        yield free
    if scheme.weight.format.kind == "int":
        yield replace(free, weight=replace(free.weight, symmetric=not scheme.weight.symmetric))


def suited(scheme: Scheme, exporter: Exporter) -> Scheme:
    """Return the first spelling that a format holds, or the scheme itself when there is none."""
    return next((each for each in spellings(scheme) if not exporter.refuses(each)), scheme)


def respelled(weight: Quantized, quant: Quant, name: str) -> Quantized:
    """Return a layer's weight under a quant of `spellings`; zero points that matter are a `SchemeError`."""
    zero = weight.zero
    if quant.symmetric and zero is not None:
        if zero.any():
            raise SchemeError(
                f"Layer {name!r} has zero points that are not 0, and the format holds none.",
                fix="Choose a format with zero points, or compress the model again with zero_point: false.",
            )
        zero = None
    elif not quant.symmetric and zero is None:
        zero = torch.zeros(weight.scale.shape, dtype=torch.int8)
    return Quantized(weight.codes, weight.scale, zero, quant, weight.global_scale)


def check_equal(written: Restored | None, layer: Restored, name: str) -> None:
    """Refuse a layer that does not read back as the numbers it had."""
    assert written is not None, name
    pairs = [
        ("codes", written.weight.codes, layer.weight.codes),
        ("scales", written.weight.scale, layer.weight.scale),
        ("input scale", written.input_scale, layer.input_scale),
    ]
    if layer.weight.zero is not None:
        pairs.append(("zero points", written.weight.zero, layer.weight.zero))
    for what, found, wanted in pairs:
        if not _equal(found, wanted):
            raise SchemeError(
                f"The format does not hold the {what} of layer {name!r} exactly.",
                fix="Compress the model again for this format.",
            )


def _equal(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return torch.equal(found.float().flatten(), wanted.float().flatten())
