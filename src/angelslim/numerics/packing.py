"""Small codes in words and bytes, in the layouts of compressed-tensors checkpoints.

Integers (``pack-quantized``): eight codes of four bits, or four of eight, share one int32, the first in the lowest
bits, each stored with an offset so that ``-8..7`` becomes ``0..15``. Weights are packed along the input dimension,
``[out, in] -> [out, in / 8]``; zero points along the output dimension, ``[out, groups] -> [out / 8, groups]``.
Lengths that do not fill a word are padded with zero bits.

FP4 (``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``): two codes share one byte, the first in the lower half,
``[out, in] -> [out, in / 2]``. The upper bit is the sign, the other three count up the magnitudes
0, 0.5, 1, 1.5, 2, 3, 4, 6. Unpacked codes are E4M3 numbers.

Any width (our own layout of low-bit weights): the fields of a row form one stream of bits, the first field in the lowest
bits of the first byte; the last byte is filled with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32  # bits
FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = torch.tensor([*FP4_MAGNITUDES, *(-value for value in FP4_MAGNITUDES)]).to(torch.float8_e4m3fn)
_NIBBLE_OF = torch.zeros(256, dtype=torch.uint8)  # bit pattern of an E4M3 number -> its FP4 code
_NIBBLE_OF[_FP4.view(torch.uint8).long()] = torch.arange(16, dtype=torch.uint8)


def pack_ints(codes: Tensor, bits: int, dim: int = 1) -> Tensor:
    """Pack signed codes of 4 or 8 bits, int8 ``[rows, columns]``, into int32 words along `dim` (0 or 1)."""
    if dim == 0:
        return pack_ints(codes.T.contiguous(), bits).T.contiguous()
    count: int = WORD // bits
    fields = codes.to(torch.int32) + (1 << (bits - 1))
    fields = F.pad(fields, (0, -codes.shape[1] % count)).view(codes.shape[0], -1, count)
    words = torch.zeros(fields.shape[:2], dtype=torch.int32, device=codes.device)
    for position in range(count):
        words |= fields[..., position] << (bits * position)
    return words


def unpack_ints(words: Tensor, bits: int, length: int, dim: int = 1) -> Tensor:
    """Undo `pack_ints`; `length` is the unpacked size along `dim`."""
    if dim == 0:
        return unpack_ints(words.T.contiguous(), bits, length).T.contiguous()
    mask = (1 << bits) - 1
    fields = torch.stack([(words >> (bits * position)) & mask for position in range(WORD // bits)], dim=-1)
    return (fields.flatten(1)[:, :length] - (1 << (bits - 1))).to(torch.int8)


def pack_int4(codes: Tensor, dim: int = 1) -> Tensor:
    """Pack int8 codes in -8..7, ``[rows, columns]``, into int32 words along `dim` (0 or 1)."""
    return pack_ints(codes, 4, dim)


def unpack_int4(words: Tensor, length: int, dim: int = 1) -> Tensor:
    """Undo `pack_int4`; `length` is the unpacked size along `dim`."""
    return unpack_ints(words, 4, length, dim)


def pack_fp4(codes: Tensor) -> Tensor:
    """Pack FP4 codes, as E4M3 numbers ``[rows, columns]``, into bytes ``[rows, columns / 2]``."""
    nibbles = _NIBBLE_OF.to(codes.device)[codes.view(torch.uint8).int()]
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Undo `pack_fp4`."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1)
    return _FP4.to(packed.device).view(torch.uint8)[nibbles.int()].view(torch.float8_e4m3fn)


def pack_bits(fields: Tensor, bits: int) -> Tensor:
    """Pack fields below ``2^bits``, uint8 ``[rows, count]``, into bytes ``[rows, ceil(count * bits / 8)]``."""
    rows, count = fields.shape
    places = torch.arange(bits, device=fields.device)
    stream = (fields[..., None].int() >> places & 1).view(rows, -1)
    stream = F.pad(stream, (0, -count * bits % 8)).view(rows, -1, 8)
    return (stream << torch.arange(8, device=fields.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`: uint8 ``[rows, count]``."""
    stream = (packed[..., None].int() >> torch.arange(8, device=packed.device) & 1).flatten(1)
    fields = stream[:, : count * bits].view(packed.shape[0], count, bits)
    return (fields << torch.arange(bits, device=packed.device)).sum(-1).to(torch.uint8)
