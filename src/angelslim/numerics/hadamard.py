"""Rotations whose entries are all of one size: Hadamard matrices, and the fast way to multiply with them.

A Hadamard matrix has entries +1 and -1 and orthogonal rows; divided by ``sqrt(n)`` it is a rotation that spreads one
large channel evenly over all n, so a tensor has no outliers in its basis. `hadamard` builds one where a construction
is known that needs no table:

* ``2n`` from ``n``, by Kronecker product with ``[[1, 1], [1, -1]]`` (Sylvester, 1867);
* ``p + 1`` for a prime ``p = 3 (mod 4)`` and ``2 p + 2`` for ``p = 1 (mod 4)``, from the squares modulo p (Paley, 1933).

That covers the widths of today's models (5120 = 2^8 * 20, 3584 = 2^7 * 28, 2880 = 2^4 * 180). Where none is known, an odd
width above all, the odd part becomes a random orthogonal matrix: still a rotation, of entries that are alike in size
but not equal.

A `Rotation` is a Kronecker product of small matrices and is never formed: multiplying n channels by factors of
f1, f2, ... channels takes ``n * (f1 + f2 + ...)`` operations, which for factors of 2 is the fast Walsh-Hadamard transform,
``O(n log n)``. Factors of `RADIX` channels do more arithmetic in fewer passes over memory, and are faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..base.errors import ConfigError

RADIX = 32
LARGEST_CORE = 512  # a larger one would make the product slow
Kind = Literal["hadamard", "random_hadamard", "orthogonal"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """The orthogonal matrix ``diag(signs) @ kron(factors)`` on `size` channels."""

    factors: tuple[Tensor, ...]  # orthogonal, float64; the product of their sizes is `size`
    signs: Tensor  # [size]: +1 or -1

    @property
    def size(self) -> int:
        """Number of channels that are mixed."""
        return len(self.signs)

    def apply(self, values: Tensor) -> Tensor:
        """Return ``values @ Q`` over the last dimension, in the type of `values`.

        Where that dimension is a multiple of `size`, each run of `size` channels is rotated by itself.
        """
        shape = values.shape
        rows = (values.reshape(-1, self.size) * self.signs.to(values)).contiguous()
        count = len(rows)
        for factor in self.factors:  # rotates the first axis of what is left, and puts it last
            order = len(factor)
            rows = rows.view(count, order, -1).transpose(1, 2).reshape(-1, order) @ factor.to(values)
            rows = rows.view(count, -1)
        return rows.view(shape)

    def matrix(self) -> Tensor:
        """Return Q itself ``[size, size]`` in float64; for tests and small sizes."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


def rotation(size: int, kind: Kind, seed: int = 0) -> Rotation:
    """Return a rotation of `size` channels; equal arguments give equal rotations.

    `hadamard` is the plain matrix; a vector that is alike in all channels ends up in one. `random_hadamard` flips
    channels at random first, so that no vector of a model is singled out (arXiv 2404.00456). `orthogonal` is drawn
    uniformly from all rotations, has no fast product, and is here to compare with.
    """
    if size < 1:
        raise ConfigError(f"A rotation of {size} channels does not exist.", fix="Use a positive size.")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.ones(size, dtype=torch.float64)
    if kind == "orthogonal":
        return Rotation((random_orthogonal(size, generator),), signs)
    if kind == "random_hadamard":
        signs = 2.0 * torch.randint(2, (size,), generator=generator).double() - 1
    return Rotation(tuple(_factors(size, generator)), signs)


def hadamard(order: int) -> Tensor | None:
    """Return a Hadamard matrix ``[order, order]`` of +1 and -1 in float64; None where no construction is known here."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order < 1 or order % 2:
        return None
    half = hadamard(order // 2)
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    return _paley(order)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Draw an orthogonal matrix ``[size, size]`` uniformly, in float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    drawn: Tensor = q * r.diagonal().sign()
    return drawn.contiguous()


def _factors(size: int, generator: torch.Generator) -> list[Tensor]:
    """Split a Hadamard rotation into small factors."""
    core = _core(size)
    matrix = hadamard(core)
    if matrix is None:
        factors = [random_orthogonal(core, generator)]
    else:
        factors = [matrix / math.sqrt(core)] if core > 1 else []
    rest = size // core
    while rest > 1:
        order = min(rest, RADIX)
        found = hadamard(order)
        assert found is not None
        factors.append(found / math.sqrt(order))
        rest //= order
    return factors or [torch.ones(1, 1, dtype=torch.float64)]


@cache
def _core(size: int) -> int:
    """Return the smallest order that, doubled often enough, is `size` and has a Hadamard matrix; else the odd part."""
    odd = size // (size & -size)
    order = odd
    while order <= min(size, LARGEST_CORE):
        if order == 1 or _paley_prime(order):
            return order
        order *= 2
    return odd


def _paley_prime(order: int) -> int:
    """Return the prime behind Paley's matrix of an order, or 0."""
    if order % 4 == 0:
        if _prime(order - 1):  # 3 (mod 4), because the order is divisible by 4
            return order - 1
        if _prime(order // 2 - 1) and order % 8 == 4:
            return order // 2 - 1
    return 0


def _paley(order: int) -> Tensor | None:
    prime = _paley_prime(order)
    if not prime:
        return None
    squares = {value * value % prime for value in range(1, prime)}
    symbol = torch.tensor([0] + [1 if value in squares else -1 for value in range(1, prime)]).double()
    index = torch.arange(prime)
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = symbol[(index[:, None] - index[None]) % prime]
    if prime % 4 == 3:  # skew: S + 1 is orthogonal
        conference[1:, 0] = -1
        return conference + torch.eye(prime + 1, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), minus)


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
