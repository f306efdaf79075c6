"""Four-bit codes in words and bytes, in the layouts of compressed-tensors checkpoints.

INT4 (``pack-quantized``): eight codes share one int32, the first in the lowest four bits, each stored with an
offset of 8 so that ``-8..7`` becomes ``0..15``. Weights are packed along the input dimension,
``[out, in] -> [out, in / 8]``; zero points along the output dimension, ``[out, groups] -> [out / 8, groups]``.
Lengths that are not a multiple of 8 are padded with zero nibbles.

FP4 (``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``): two codes share one byte, the first in the lower half,
``[out, in] -> [out, in / 2]``. The upper bit is the sign, the other three count up the magnitudes
0, 0.5, 1, 1.5, 2, 3, 4, 6. Unpacked codes are E4M3 numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PER_WORD = 8
OFFSET = 8
FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = torch.tensor([*FP4_MAGNITUDES, *(-value for value in FP4_MAGNITUDES)]).to(torch.float8_e4m3fn)
_NIBBLE_OF = torch.zeros(256, dtype=torch.uint8)  # bit pattern of an E4M3 number -> its FP4 code
_NIBBLE_OF[_FP4.view(torch.uint8).long()] = torch.arange(16, dtype=torch.uint8)


def pack_int4(codes: Tensor, dim: int = 1) -> Tensor:
    """Pack int8 codes in -8..7, ``[rows, columns]``, into int32 words along `dim` (0 or 1)."""
    if dim == 0:
        return pack_int4(codes.T.contiguous()).T.contiguous()
    nibbles = codes.to(torch.int32) + OFFSET
    nibbles = F.pad(nibbles, (0, -codes.shape[1] % PER_WORD)).view(codes.shape[0], -1, PER_WORD)
    words = torch.zeros(nibbles.shape[:2], dtype=torch.int32, device=codes.device)
    for position in range(PER_WORD):
        words |= nibbles[..., position] << (4 * position)
    return words


def unpack_int4(words: Tensor, length: int, dim: int = 1) -> Tensor:
    """Undo `pack_int4`; `length` is the unpacked size along `dim`."""
    if dim == 0:
        return unpack_int4(words.T.contiguous(), length).T.contiguous()
    nibbles = torch.stack([(words >> (4 * position)) & 0xF for position in range(PER_WORD)], dim=-1)
    return (nibbles.flatten(1)[:, :length] - OFFSET).to(torch.int8)


def pack_fp4(codes: Tensor) -> Tensor:
    """Pack FP4 codes, as E4M3 numbers ``[rows, columns]``, into bytes ``[rows, columns / 2]``."""
    nibbles = _NIBBLE_OF.to(codes.device)[codes.view(torch.uint8).int()]
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Undo `pack_fp4`."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1)
    return _FP4.to(packed.device).view(torch.uint8)[nibbles.int()].view(torch.float8_e4m3fn)
