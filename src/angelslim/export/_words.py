"""What the formats share: small codes in 32-bit words, and scales that a smaller type holds exactly.

GPTQ and AWQ folders keep unsigned codes ``0 .. 2^bits - 1``, ``32 / bits`` of them in one int32, the first in the
lowest bits; AWQ first shuffles each run of eight (`order[p]` is the code that goes to position p). Both store
matrices input first, ``[in, out]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.errors import SchemeError

WORD = 32


def pack_words(values: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Pack unsigned values ``[rows, columns]`` of `bits` bits into int32 ``[rows, columns * bits / 32]``."""
    count = WORD // bits
    split = values.to(torch.int32).reshape(values.shape[0], -1, count)
    words = torch.zeros(split.shape[:2], dtype=torch.int32, device=values.device)
    for position, column in enumerate(order or range(count)):
        words |= split[..., column] << (bits * position)
    return words


def unpack_words(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Undo `pack_words`: int32 ``[rows, words]`` -> unsigned values, int32 ``[rows, words * 32 / bits]``."""
    count, mask = WORD // bits, 2**bits - 1
    split = torch.empty((*words.shape, count), dtype=torch.int32, device=words.device)
    for position, column in enumerate(order or range(count)):
        split[..., column] = (words >> (bits * position)) & mask
    return split.flatten(1)


def whole_words(shape: tuple[int, int], bits: int) -> str:
    """Return why a layer ``(out, in)`` cannot be packed, or an empty string: words are never padded."""
    count = WORD // bits
    if shape[0] % count or shape[1] % count:
        return f"its sizes {shape[0]} x {shape[1]} are not multiples of {count}"
    return ""


def exactly(scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return the scales in `dtype`; one that would be rounded is a `SchemeError` that names the layer."""
    kept = scale.to(dtype)
    if not torch.equal(kept.float(), scale.float()):
        short = str(dtype).removeprefix("torch.")
        raise SchemeError(
            f"Layer {name!r} has scales that {short} does not hold exactly.",
            fix=f"Compress the model again for this format, so that scales are rounded to {short} before codes are chosen.",
        )
    return kept
