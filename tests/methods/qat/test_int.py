"""INT4 and INT8 with learned scales: the weights of rounding to nearest at first, then better ones."""

from __future__ import annotations

import pytest
import torch

from angelslim.methods.qat.base import merge
from angelslim.numerics.quantize import quantize
from angelslim.numerics.scheme import FORMATS, PER_CHANNEL, Quant, per_group

from .helpers import EXACT, linear, quantized, quantizer_of

QUANTS = {4: Quant(FORMATS["int4"], per_group(32)), 8: Quant(FORMATS["int8"], PER_CHANNEL)}
widths = pytest.mark.parametrize("bits", QUANTS)


def made(bits, **options):
    group = {"group_size": 32} if bits == 4 else {}
    return quantized("int", {"bits": bits, **group, **options})


@widths
def test_training_starts_from_rounding_to_nearest(bits):
    record = merge(made(bits, **EXACT))[""]
    plain = quantize(linear().weight.detach(), QUANTS[bits])
    assert record.quant == plain.quant and torch.allclose(record.scale, plain.scale)
    assert (record.codes != plain.codes).float().mean() < 0.01


@widths
def test_scales_learn_to_lose_less(bits):
    layer = made(bits, **EXACT)
    weight, scale = linear().weight.detach(), quantizer_of(layer).scale
    first = (layer.weight - weight).square().sum().item()
    optimizer = torch.optim.SGD([scale], lr=3e-4 if bits == 4 else 1e-5)
    for _ in range(30):
        optimizer.zero_grad()
        (layer.weight - weight).square().sum().backward()
        optimizer.step()
    assert (layer.weight - weight).square().sum().item() < first


def test_scales_are_kept_as_engines_keep_them():
    assert merge(made(4))[""].scale.dtype == torch.bfloat16
    assert merge(made(8))[""].scale.dtype == torch.float32
    half = merge(made(4, scale_dtype="float16"))[""]
    assert half.scale.dtype == torch.float16 and half.quant.scale == "float16"


def test_bfloat16_masters_are_rounded_in_float32():
    exact, narrow = made(4), made(4).bfloat16()
    assert narrow.weight.dtype == torch.bfloat16
    assert torch.allclose(narrow.weight.float(), exact.weight, atol=0.02)
