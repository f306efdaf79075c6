"""Quantized weights as GGUF blocks: runs of 32 or 256 values of a row with their own scale.

=========  ===============================================  ==========================
type       a block                                          a weight
=========  ===============================================  ==========================
``Q8_0``   32: F16 d, 32 signed bytes                       ``d * code``
``Q4_0``   32: F16 d, 16 bytes                              ``d * (nibble - 8)``
``Q4_K``   256: F16 d, F16 dmin, 12 bytes of s and m,       ``d * s * nibble - dmin * m``
           128 bytes
``MXFP4``  32: one exponent byte e, 16 bytes                ``2^(e - 127) * FP4``
=========  ===============================================  ==========================

Byte j of a four-bit block holds value j in its lower half and value j + 16 in its upper half (of ``Q4_K``: j + 32, for
each 64 values). Larger groups become several blocks with equal scales.

Zero points go into ``Q4_K``: ``d = dmin = scale``, ``s = 1`` and ``m`` the zero point give exactly ``scale * (nibble - m)``.
Its s and m belong to 32 values and have six bits, d to 256: a scale for fewer inputs than that would have to be a
six-bit multiple of its neighbours', and only scales that were chosen so are. ``Q4_1`` keeps the product of scale and
zero point in float16, which rounds it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...numerics.packing import pack_fp4, pack_int4
from ...numerics.quantize import Quantized, spread, tile_of
from ...numerics.scales import e8m0_bytes
from ...numerics.scheme import Quant, Scheme
from .._words import exactly
from ._gguf_types import KINDS

BLOCK = 32
TYPES = {"int8": "Q8_0", "int4": "Q4_0", "fp4_e2m1": "MXFP4"}
OFFSETS = {"int4": "Q4_K"}  # with zero points


def type_of(quant: Quant) -> str:
    """Return the type for these weights, or an empty string."""
    return (TYPES if quant.symmetric else OFFSETS).get(quant.format.name, "")


def refuses(scheme: Scheme, shape: tuple[int, int]) -> str:
    """Return why no type holds a layer ``(out, in)`` of this scheme exactly, or an empty string."""
    quant = scheme.weight
    name = type_of(quant)
    if not name and type_of(replace(quant, symmetric=True)):
        return f"no type has {quant.format.name} weights with zero points"
    if not name or quant.scale == "e4m3" or (name == "MXFP4") != (quant.scale == "e8m0"):
        return f"no type has {quant.format.name} weights with {quant.scale} scales"
    if scheme.input is not None or scheme.kv is not None:
        return "its types quantize weights only"
    block = KINDS[name].block
    if _group(quant, shape) % block:
        why = "" if quant.symmetric else " where there are zero points (Q4_1 would round them)"
        return f"scales must be shared by a multiple of {block} inputs{why}"
    return ""


def _group(quant: Quant, shape: tuple[int, int]) -> int:
    rows, columns = tile_of(quant.granularity, shape)
    return columns if rows in (1, shape[0]) else 1  # square tiles are refused with the rest


def to_blocks(weight: Quantized, name: str) -> Tensor:
    """Return a layer's blocks as bytes ``[out, in / 32 * bytes per block]``."""
    kind = type_of(weight.quant)
    if kind == "Q4_K":
        return _q4_k(weight, name)
    rows, columns = weight.codes.shape
    tile = tile_of(weight.quant.granularity, (rows, columns))
    scale = spread(weight.scale, tile, (rows, columns))[:, ::BLOCK].contiguous()
    codes = weight.codes.reshape(rows, -1, BLOCK)
    if kind == "MXFP4":
        head, body = e8m0_bytes(scale).unsqueeze(-1), pack_fp4(halves_as_pairs(codes))
    else:
        head = exactly(scale, torch.float16, name).view(torch.uint8).reshape(rows, -1, 2)
        body = codes if kind == "Q8_0" else pack_int4(halves_as_pairs(codes))
    body = body.contiguous().view(torch.uint8).reshape(rows, columns // BLOCK, -1)
    return torch.cat([head, body], dim=-1).flatten(1)


def _q4_k(weight: Quantized, name: str) -> Tensor:
    """Return the blocks of codes and zero points -8..7, which the file keeps as 0..15."""
    rows, columns = weight.codes.shape
    tile, block = tile_of(weight.quant.granularity, (rows, columns)), KINDS["Q4_K"].block
    assert weight.zero is not None
    scale, zero = (
        spread(each, tile, (rows, columns))[:, ::block].contiguous() for each in (weight.scale, weight.zero)
    )
    d = exactly(scale, torch.float16, name).unsqueeze(-1).view(torch.uint8)
    m = (zero + 8).to(torch.uint8).unsqueeze(-1).expand(-1, -1, 4)
    one = torch.ones_like(m)
    halves = (weight.codes + 8).to(torch.uint8).reshape(rows, -1, block // 64, 2, 32)
    body = (halves[..., 0, :] + 16 * halves[..., 1, :]).flatten(2)
    # s of the first four, m of the first four, then both of the last four in a byte each
    return torch.cat([d, d, one, m, one + 16 * m, body], dim=-1).flatten(1)


def halves_as_pairs(codes: Tensor) -> Tensor:
    """Bring values j and j + 16 of each block side by side: ``[out, blocks, 32] -> [out * blocks, 32]``."""
    half = BLOCK // 2
    return codes.reshape(-1, 2, half).transpose(1, 2).reshape(-1, BLOCK)
