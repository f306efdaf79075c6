"""Four-bit codes in 32-bit words, in the layout of the ``pack-quantized`` checkpoints.

Eight codes share one int32, the first in the lowest four bits, each stored with an offset of 8 so that
``-8..7`` becomes ``0..15``. Weights are packed along the input dimension, ``[out, in] -> [out, in / 8]``; zero
points along the output dimension, ``[out, groups] -> [out / 8, groups]``. Lengths that are not a multiple of 8
are padded with zero nibbles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PER_WORD = 8
OFFSET = 8


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
