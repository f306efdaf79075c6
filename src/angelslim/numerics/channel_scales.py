"""INT4 group scales that survive an engine's conversion to FP8.

Kernels that multiply INT4 weights with FP8 inputs keep a group's scale as an FP8 number and one float32 factor for
each output channel. Engines make the pair while loading: the factor is the row's largest scale over 448 (never
less than ``1 / (448 * 512)``), the FP8 number is ``scale / factor``, rounded; the kernel then holds an eighth of
the number and eight times the factor. A scale that was not meant for this moves by up to 6 %, and every weight of
its group with it, after the codes were chosen.

So the scales are made of such pairs to begin with: ``s = c v``.

* v is an E4M3 number and a multiple of 2^-6, so that an eighth of it is one too, and the row's largest v is 448:
  the engine finds c again. c has four significant bits, as v has, and their product fits into the eight of
  bfloat16: no step of the conversion rounds, and the weights that the engine computes with are bit for bit those
  that were chosen here.
* Rows whose largest scale is below 1/512 get the engine's smallest factor as c. It has no short form, so these
  scales are kept in float32; they are right to 2^-24, and their v survives whatever type they are loaded in.

This holds while a row is whole. Tensor parallelism over *inputs* (the down and output projections) gives each
device a part of the row, whose largest v may be another; then the device rounds v once more.

`nearest` takes the v nearest to the quotient; `search` the one of its two neighbours that loses less, which on
normally distributed weights takes 6 % off the squared error. (Trying several c takes off another 4 %, by shrinking
the weights to 0.99 of themselves; that is left to methods that look at the layer's inputs.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOP = 448.0
SMALLEST_FACTOR = 1 / (TOP * 512)
STEP = 2.0**-6  # an eighth of a number must not need smaller steps than 2^-9
OF_ZEROS = 2.0**-17  # the factor of a row of zeros


def factors(exact: Tensor) -> Tensor:
    """Return each row's factor ``[out, 1]`` in float32 for the wanted scales ``[out, groups]`` in float64."""
    wanted = exact.amax(1, keepdim=True) / TOP
    return _four_bits(torch.where(wanted > 0, wanted, OF_ZEROS)).clamp(min=SMALLEST_FACTOR).float()


def _four_bits(values: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 16).round(), exponent - 4)


def nearest(exact: Tensor, factor: Tensor) -> Tensor:
    """Return the scales ``c v`` nearest to the wanted ones, in bfloat16 when that holds all of them."""
    return _narrow(_numbers(exact, factor, 0) * factor)


def search(exact: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return scales ``c v`` with the v next to the quotients for which `loss` is less.

    `loss` maps scales to the loss of each group, both ``[out, groups]``.
    """
    factor = factors(exact)
    below, above = (_numbers(exact, factor, side) * factor for side in (-1, 1))
    return _narrow(torch.where(loss(below) < loss(above), below, above))


def _numbers(exact: Tensor, factor: Tensor, side: int) -> Tensor:
    """Return v in float32: nearest to the quotients, or next below (-1) or above (1) them; the row's top is 448."""
    quotient = (exact / factor.double()).clamp(STEP, TOP)
    spacing = torch.ldexp(torch.ones_like(quotient), torch.frexp(quotient).exponent - 4).clamp(min=STEP)
    steps = quotient / spacing
    steps = steps.round() if side == 0 else steps.floor() if side < 0 else steps.ceil()
    numbers = (steps * spacing).clamp(STEP, TOP)
    recovered = factor > torch.tensor(SMALLEST_FACTOR, dtype=torch.float32)  # from the row's largest scale
    return torch.where((exact == exact.amax(1, keepdim=True)) & recovered, TOP, numbers).float()


def _narrow(scale: Tensor) -> Tensor:
    short = scale.to(torch.bfloat16)
    return short if torch.equal(short.float(), scale) else scale
