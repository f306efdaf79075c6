"""Quantized weights as GGUF blocks: runs of 32 values of a row with their own scale.

=========  ==========================================  =====================
type       a block                                     a weight
=========  ==========================================  =====================
``Q8_0``   F16 d, 32 signed bytes                      ``d * code``
``Q4_0``   F16 d, 16 bytes                             ``d * (nibble - 8)``
``MXFP4``  one exponent byte e, 16 bytes               ``2^(e - 127) * FP4``
=========  ==========================================  =====================

Byte j of a four-bit block holds value j in its lower half and value j + 16 in its upper half. Larger groups become
several blocks with equal scales. The types with an offset (``Q4_1``, ``Q4_K``) store it as a rounded product, and
the scales of ``Q4_K`` are six-bit fractions of another scale: only numbers that were chosen so would fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...numerics.packing import pack_fp4, pack_int4
from ...numerics.quantize import Quantized, spread, tile_of
from ...numerics.scales import e8m0_bytes
from ...numerics.scheme import Quant, Scheme
from .._words import exactly

BLOCK = 32
TYPES = {"int8": "Q8_0", "int4": "Q4_0", "fp4_e2m1": "MXFP4"}


def refuses(scheme: Scheme, shape: tuple[int, int]) -> str:
    """Return why no type holds a layer ``(out, in)`` of this scheme exactly, or an empty string."""
    quant = scheme.weight
    name = TYPES.get(quant.format.name, "")
    if not name or quant.scale == "e4m3" or (name == "MXFP4") != (quant.scale == "e8m0"):
        return f"no type has {quant.format.name} weights with {quant.scale} scales"
    if scheme.input is not None or scheme.kv is not None:
        return "its types quantize weights only"
    if not quant.symmetric:
        return "zero points would have to be rounded (Q4_1 and Q4_K keep their products with the scales)"
    return f"scales must be shared by a multiple of {BLOCK} inputs" if _group(quant, shape) % BLOCK else ""


def _group(quant: Quant, shape: tuple[int, int]) -> int:
    rows, columns = tile_of(quant.granularity, shape)
    return columns if rows in (1, shape[0]) else 1  # square tiles are refused with the rest


def to_blocks(weight: Quantized, name: str) -> Tensor:
    """Return a layer's blocks as bytes ``[out, in / 32 * bytes per block]``."""
    kind = TYPES[weight.quant.format.name]
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


def halves_as_pairs(codes: Tensor) -> Tensor:
    """Bring values j and j + 16 of each block side by side: ``[out, blocks, 32] -> [out * blocks, 32]``."""
    half = BLOCK // 2
    return codes.reshape(-1, 2, half).transpose(1, 2).reshape(-1, BLOCK)
