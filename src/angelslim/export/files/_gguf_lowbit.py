"""Two-bit and ternary weights as GGUF blocks that hold them exactly.

Two kinds of weights, as integer codes int8 ``[out, in]`` and one scale for each tile of a row ``[out, tiles]``:

===========  ==============  ==========================  =====================================
kind         codes           a weight                    comes from
===========  ==============  ==========================  =====================================
``ternary``  -1, 0, 1        ``scale * code``            1.58-bit training (BitNet, arXiv 2402.17764)
``seq``      0, 1, 2, 3      ``scale * (code - 1.5)``    2-bit training with balanced levels
                                                         (ParetoQ, arXiv 2502.02631)
===========  ==============  ==========================  =====================================

Stock llama.cpp has no type that is called SEQ, but its ``Q2_K`` computes ``d * s * q - dmin * m`` with small
integers s and m, and ``d = scale, s = 1, dmin = scale / 2, m = 3`` gives exactly ``scale * (q - 1.5)``.

=========  =====  ===========================  ======================================================
type       block  a block, in bytes            a weight
=========  =====  ===========================  ======================================================
``TQ1_0``  256    52 codes, F16 d              ``d * (trit - 1)``; five trits a byte
``TQ2_0``  256    64 codes, F16 d              ``d * (code - 1)``
``Q2_0``   64     F16 d, 16 codes              ``d * (code - 1)``
``Q2_K``   256    16 s and m, 64 codes,        ``d * s * code - dmin * m``
                  F16 d, F16 dmin
``Q4_0``   32     F16 d, 16 codes              ``d * (nibble - 8)``: ternary with ``d = scale``,
                                               SEQ with ``d = scale / 2`` and odd codes -3, -1, 1, 3
=========  =====  ===========================  ======================================================

Whether a type holds the numbers is a question of two things. The tile must be a whole number of blocks. And every d
(and dmin) must be a float16: at most 11 significant bits, a magnitude of at most 65504, and no bit below 2^-24. A
float32 scale that was trained freely is none, so training rounds its scales to float16 before it ends, or the packer
is told ``round_scales=True``: then scales move by at most 2^-11 of themselves (those below 2^-13 by at most 2^-24), and
codes stay. Shapes that do not fit and scales that would be rounded unasked are a `SchemeError`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...base.errors import SchemeError
from ...numerics.packing import pack_int4
from ._gguf_blocks import halves_as_pairs
from ._gguf_types import KINDS

TYPES = {"ternary": ("TQ1_0", "TQ2_0", "Q2_0", "Q4_0"), "seq": ("Q2_K", "Q4_0")}  # by size, smallest first
CODES = {"ternary": (-1, 1), "seq": (0, 3)}


def gguf_types(kind: str, group: int) -> list[str]:
    """Return the types that hold weights of a kind exactly when `group` inputs share a scale, smallest first.

    >>> gguf_types("ternary", 64), gguf_types("seq", 1024), gguf_types("seq", 48)
    (['Q2_0', 'Q4_0'], ['Q2_K', 'Q4_0'], [])
    """
    return [name for name in TYPES[kind] if group % KINDS[name].block == 0]


def pack(kind: str, name: str, codes: Tensor, scale: Tensor, *, round_scales: bool = False) -> Tensor:
    """Return the blocks of type `name`, bytes ``[out, in / block * bytes per block]``.

    `kind` says what the codes mean. What the type does not hold exactly is a `SchemeError`, but for scales that may
    be rounded to float16.
    """
    rows, columns = codes.shape
    assert codes.min() >= CODES[kind][0] and codes.max() <= CODES[kind][1], f"not {kind} codes"
    group = columns // scale.shape[1]
    assert scale.shape[0] == rows and group * scale.shape[1] == columns, (codes.shape, scale.shape)
    if name not in gguf_types(kind, group):
        raise _misfit(kind, name, group)
    block = KINDS[name].block
    per_block = scale.float().repeat_interleave(group // block, 1)
    split = codes.reshape(rows, columns // block, block)
    packed = _PACKERS[name](kind, split, per_block, round_scales)
    assert packed.shape[-1] == KINDS[name].nbytes
    return packed.flatten(1)


def pack_q2_k(codes: Tensor, scale: Tensor, *, round_scales: bool = False) -> Tensor:
    """Pack SEQ codes 0..3 as ``Q2_K``; the scale and its half must be float16 numbers."""
    return pack("seq", "Q2_K", codes, scale, round_scales=round_scales)


def pack_tq1_0(codes: Tensor, scale: Tensor, *, round_scales: bool = False) -> Tensor:
    """Pack ternary codes as ``TQ1_0``: 1.69 bits a weight."""
    return pack("ternary", "TQ1_0", codes, scale, round_scales=round_scales)


def pack_tq2_0(codes: Tensor, scale: Tensor, *, round_scales: bool = False) -> Tensor:
    """Pack ternary codes as ``TQ2_0``: 2.06 bits a weight, faster to unpack."""
    return pack("ternary", "TQ2_0", codes, scale, round_scales=round_scales)


def pack_q2_0(codes: Tensor, scale: Tensor, *, round_scales: bool = False) -> Tensor:
    """Pack ternary codes as ``Q2_0``: 2.25 bits a weight, scales of 64, 128, ... inputs."""
    return pack("ternary", "Q2_0", codes, scale, round_scales=round_scales)


def pack_q4_0(kind: str, codes: Tensor, scale: Tensor, *, round_scales: bool = False) -> Tensor:
    """Pack codes of either kind as ``Q4_0``: 4.5 bits a weight, scales of 32, 64, ... inputs, run everywhere."""
    return pack(kind, "Q4_0", codes, scale, round_scales=round_scales)


def holds_scales(kind: str, name: str, scale: Tensor) -> bool:
    """Say whether a type keeps these scales unrounded."""
    return bool((_stored(kind, name, scale.float()).float() * _factor(kind, name) == scale.float()).all())


def _factor(kind: str, name: str) -> float:
    """Return what the smallest float16 of a block is multiplied with to give the scale: 2 where half of it is kept."""
    return 2.0 if kind == "seq" and name in ("Q2_K", "Q4_0") else 1.0


def _stored(kind: str, name: str, scale: Tensor) -> Tensor:
    return (scale / _factor(kind, name)).half()


def _halves(kind: str, name: str, scale: Tensor, round_scales: bool) -> Tensor:
    """Return the scales, or their halves, in float16; what would be lost unasked is refused."""
    kept = _stored(kind, name, scale)
    largest = 2 * kept if name == "Q2_K" else kept
    if not bool(largest.isfinite().all()):
        raise SchemeError("Scales beyond float16's 65504 fit in no GGUF type.", fix="Train the model again.")
    if not round_scales and not holds_scales(kind, name, scale):
        raise SchemeError(
            f"{name} keeps scales in float16, which does not hold these exactly.",
            fix="Round the scales to float16 before the codes are chosen, or allow it here with round_scales=True.",
        )
    return kept


def _bytes(numbers: Tensor) -> Tensor:
    """See float16 numbers ``[out, blocks]`` as bytes ``[out, blocks, 2]``."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


def _misfit(kind: str, name: str, group: int) -> SchemeError:
    fitting = gguf_types(kind, group)
    if name not in TYPES[kind]:
        why = f"{name} has no {kind} weights"
    else:
        why = f"{name} has one scale for each {KINDS[name].block} inputs, and {group} is no multiple of that"
    return SchemeError(
        f"{kind} weights with a scale for {group} inputs do not fit: {why}.",
        fix=f"Use {' or '.join(fitting)}." if fitting else "Share scales among 32, 64, 128 or 256 inputs.",
    )


def _two_bits(fields: Tensor) -> Tensor:
    """Join four two-bit fields ``[..., 4, n]`` in bytes ``[..., n]``, the first in the lowest bits."""
    shifts = torch.tensor([1, 4, 16, 64], device=fields.device).view(4, 1)
    return (fields.int() * shifts).sum(-2).to(torch.uint8)


def _trits(fields: Tensor, places: int) -> Tensor:
    """Join base-3 digits ``[..., n, m]``, the first the highest of `places`, in bytes ``[..., m]``.

    A byte is the fraction ``number / 3^places`` in units of 1/256, rounded up: multiplying it by 3 moves the first
    digit in front of the point, and again the next.
    """
    weights = [3 ** (places - 1 - place) for place in range(fields.shape[-2])]
    powers = torch.tensor(weights, device=fields.device)
    number = (fields.int() * powers.view(-1, 1)).sum(-2)
    parts: Tensor = (number * 256 + 3**places - 1) // 3**places
    return parts.to(torch.uint8)


def _tq1_0(kind: str, codes: Tensor, scale: Tensor, round_scales: bool) -> Tensor:
    digits, lead = codes + 1, codes.shape[:2]
    parts = [
        _trits(digits[..., :160].reshape(*lead, 5, 32), 5),
        _trits(digits[..., 160:240].reshape(*lead, 5, 16), 5),
        _trits(digits[..., 240:].reshape(*lead, 4, 4), 5),  # four digits of five
    ]
    return torch.cat([*parts, _bytes(_halves(kind, "TQ1_0", scale, round_scales))], -1)


def _tq2_0(kind: str, codes: Tensor, scale: Tensor, round_scales: bool) -> Tensor:
    body = _two_bits((codes + 1).reshape(*codes.shape[:2], 2, 4, 32)).flatten(2)
    return torch.cat([body, _bytes(_halves(kind, "TQ2_0", scale, round_scales))], -1)


def _q2_0(kind: str, codes: Tensor, scale: Tensor, round_scales: bool) -> Tensor:
    body = _two_bits((codes + 1).reshape(*codes.shape[:2], 16, 4).transpose(-1, -2))
    return torch.cat([_bytes(_halves(kind, "Q2_0", scale, round_scales)), body], -1)


def _q2_k(kind: str, codes: Tensor, scale: Tensor, round_scales: bool) -> Tensor:
    lower = _halves(kind, "Q2_K", scale, round_scales)  # dmin; d is twice that, so that levels stay symmetric
    small = codes.new_full((*codes.shape[:2], 16), 1 + (3 << 4), dtype=torch.uint8)
    body = _two_bits(codes.reshape(*codes.shape[:2], 2, 4, 32)).flatten(2)
    return torch.cat([small, body, _bytes(2 * lower), _bytes(lower)], -1)


def _q4_0(kind: str, codes: Tensor, scale: Tensor, round_scales: bool) -> Tensor:
    signed = codes if kind == "ternary" else 2 * codes - 3
    body = pack_int4(halves_as_pairs(signed)).view(torch.uint8).reshape(*codes.shape[:2], 16)
    return torch.cat([_bytes(_halves(kind, "Q4_0", scale, round_scales)), body], -1)


_PACKERS: dict[str, Callable[[str, Tensor, Tensor, bool], Tensor]] = {
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "Q2_0": _q2_0,
    "Q2_K": _q2_k,
    "Q4_0": _q4_0,
}
