"""3:4 sparse ternary weights (Sherry, arXiv 2601.07892): of four neighbours three are signs and one is zero.

Four ternary numbers take 81 states and waste most of a byte, or 6.34 bits. With exactly one zero they take
``C(4, 3) * 2^3 = 32`` states: five bits for four weights, 1.25 bits a weight, without a gap and at places that never
straddle the fours. The zero is where the magnitude is smallest (the first of equals), the scale is the mean magnitude of
the kept weights of a tile, which is the best one for that mask in the least-squares sense.

sign(0) is +1 here. With the usual sign(0) = 0 a four with two zeros turns up as soon as two weights are exactly zero, and
no code stands for it.

A code is ``8 * zero + n1 + 2 * n2 + 4 * n3``: the lane of the zero, and whether the first, second and third kept weight
is negative. Shapes: weights and codes ``[out, in]``, five-bit codes ``[out, in / 4]``, unpacked, one a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...base.errors import SchemeError

FOUR = 4
KEPT = 3 / 4
_LANES = torch.arange(FOUR)


def _table() -> Tensor:
    """Return the four weights of each code, int8 ``[32, 4]``."""
    rows = []
    for code in range(32):
        signs = [-1 if code >> bit & 1 else 1 for bit in range(3)]
        rows.append([*signs[: code >> 3], 0, *signs[code >> 3 :]])
    return torch.tensor(rows, dtype=torch.int8)


TABLE = _table()


def require_fours(columns: int) -> None:
    """Refuse an input size, or a group size, that is no multiple of four."""
    if columns % FOUR:
        raise SchemeError(
            f"3:4 sparsity takes weights four at a time, and {columns} is not a multiple of 4.",
            fix="Choose a group size that is, or add the layer to ignore_layers.",
        )


def zero_lanes(magnitudes: Tensor) -> Tensor:
    """Return a mask ``[..., 4]`` with exactly one True in each four: the smallest, the first of equals.

    Comparisons of lanes rather than a minimum: a compiler can make one kernel of them, and they decide ties.
    """
    lanes = magnitudes.unbind(-1)
    least = []
    for lane, size in enumerate(lanes):
        behind = [size <= other for other in lanes[lane + 1 :]]
        smallest = [size < other for other in lanes[:lane]] + behind
        least.append(smallest[0] & smallest[1] & smallest[2])
    return torch.stack(least, -1)


def signs34(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes -1, 0, 1 in the type of `tiles`, scale ``[down, across, 1]``) of ``[down, across, size]``."""
    magnitudes = tiles.abs()
    zero = zero_lanes(magnitudes.view(*tiles.shape[:-1], -1, FOUR)).view(tiles.shape)
    scale = magnitudes.masked_fill_(zero, 0.0).sum(-1, keepdim=True) / (KEPT * tiles.shape[-1])
    # torch.where takes four times as long on a processor.
    codes = (tiles < 0).to(tiles.dtype).mul_(-2).add_(1)
    return codes.masked_fill_(zero, 0.0), scale


def is_encodable(codes: Tensor) -> bool:
    """Say whether each contiguous four of ternary codes ``[out, in]`` has exactly one zero."""
    if codes.shape[1] % FOUR:
        return False
    return bool(((codes.view(codes.shape[0], -1, FOUR) == 0).sum(-1) == 1).all())


def encode34(codes: Tensor) -> Tensor:
    """Return the five-bit codes, uint8 ``[out, in / 4]``, of 3:4 sparse ternary codes ``[out, in]``."""
    assert is_encodable(codes), "each four needs exactly one zero"
    fours = codes.view(codes.shape[0], -1, FOUR)
    zero = (fours == 0).int().argmax(-1)
    # The place of a lane among the kept ones is one less behind the zero.
    place = (_LANES.to(codes.device) - (_LANES.to(codes.device) > zero[..., None]).long()).clamp(max=2)
    negative = (fours < 0).long() << place
    return (8 * zero + negative.sum(-1)).to(torch.uint8)


def decode34(packed: Tensor) -> Tensor:
    """Undo `encode34`: int8 ``[out, in]``."""
    return TABLE.to(packed.device)[packed.long()].view(packed.shape[0], -1)
