"""Matrix products on processors with bfloat16 instructions: several times faster, and exact where factors are bfloat16.

Such a processor multiplies bfloat16 numbers and adds up in float32. That is *exact* up to the order of the sum when both
factors are bfloat16 numbers already, as the activations of most models are: the squares of inputs, ``X^T X``, lose
nothing (`Squares`). Where factors have more digits the product's error is about ``2^-9`` of each term, at random:
too much for a Hessian that will be inverted, nothing for the sum of a hundred thousand squares that candidates are
compared by (`bfloat16_factors`, `Quadratic`).

CPU code is made and kept for each shape, so shapes that change from call to call would cost time and memory.

Other processors and accelerators compute as ever: the switch is that of PyTorch's CPU library alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..base import parallel

PANELS = 8  # strips in which the upper half of a symmetric sum is accumulated
NARROWEST = 64  # columns of a strip
TOGETHER = 1024  # tokens that are added up at once: each product passes over all the sums


@cache
def _fast() -> bool:
    """Say whether this processor multiplies bfloat16 numbers by itself."""
    known = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", None),
        getattr(torch.cpu, "_is_amx_tile_supported", None),
    )
    return hasattr(torch.backends.mkldnn, "matmul") and any(each is not None and each() for each in known)


@contextmanager
def bfloat16_factors(allowed: bool = True) -> Iterator[None]:
    """Let float32 products on the processor round their factors to bfloat16 where that is faster; sums are float32."""
    if not (allowed and _fast()):
        yield
        return
    switch: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009  untyped
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def for_comparing(matrix: Tensor) -> Tensor:
    """Return a factor of products that are summed up and compared: three digits where they are much faster."""
    return matrix.bfloat16() if matrix.device.type == "cpu" and _fast() else matrix


class Quadratic:
    """What rows x ``[in]`` cost under a symmetric H ``[in, in]``: ``x H x^T``, to about three digits.

    Only half of H is multiplied with: what lies on one side of the diagonal counts twice.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._strips: list[tuple[int, int, Tensor]] = []
        width = len(matrix)
        step = max(-(-width // PANELS), 2 * NARROWEST)
        for start in range(0, width, step):
            stop = min(start + step, width)
            strip = matrix[start:, start:stop].clone()
            strip[stop - start :] *= 2
            strip = for_comparing(strip)
            self._strips.append((start, stop, strip))

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the costs ``[rows]`` of ``[rows, in]`` in float32."""
        values = for_comparing(rows.float())
        cost = torch.zeros(len(rows), device=rows.device)
        for start, stop, strip in self._strips:
            cost += torch.linalg.vecdot((values[:, start:] @ strip).float(), values[:, start:stop].float())
        return cost


class Squares:
    """The sum of ``X^T X [in, in]`` over inputs ``[tokens, in]`` that come in parts, in float32.

    Only the upper half is summed up; the lower one is its mirror image. Parts of one type are kept, in the type that the
    products take, until `TOGETHER` tokens have come.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self._sums = torch.zeros(width, width, device=device)
        self._kept: Tensor | None = None  # [TOGETHER, in], the first `_count` rows of it filled
        self._count = 0
        self._dtype = torch.float32  # that they came in

    def add(self, inputs: Tensor) -> None:
        """Add the squares of some more inputs ``[tokens, in]``, which may change afterwards."""
        if self._dtype != inputs.dtype:
            self._multiply_kept()
        self._dtype = inputs.dtype
        if not self._count and len(inputs) >= TOGETHER:
            self._multiply(inputs.float())
            return
        if self._kept is None:
            self._kept = torch.empty(TOGETHER, len(self._sums), device=self._sums.device)
        for part in inputs.tensor_split(list(range(TOGETHER - self._count, len(inputs), TOGETHER))):
            self._kept[self._count : self._count + len(part)] = part
            self._count += len(part)
            if self._count == TOGETHER:
                self._multiply_kept()

    def rescale(self, columns: Tensor) -> None:
        """Divide the inputs by `columns` ``[in]``."""
        self._flush()
        self._sums /= columns[:, None] * columns

    def merge(self) -> None:
        """Add the sums of the other processes of the run."""
        self._flush()
        self._sums = parallel.total(self._sums)

    def whole(self) -> Tensor:
        """Return the sum, both halves of it; what is added later changes it."""
        self._flush()
        for start, stop in self._panels():
            corner = self._sums[start:stop, start:stop]
            corner.copy_(corner.triu().add_(corner.triu(1).T))
            self._sums[stop:, start:stop] = self._sums[start:stop, stop:].T
        return self._sums

    def _flush(self) -> None:
        """Bring the sums up to date; nothing is kept, for this is done when all has been seen."""
        self._multiply_kept()
        self._kept = None

    def _multiply_kept(self) -> None:
        if self._kept is not None and self._count:
            self._multiply(self._kept[: self._count])
        self._count = 0

    def _multiply(self, values: Tensor) -> None:
        with bfloat16_factors(self._dtype == torch.bfloat16):
            for start, stop in self._panels():
                self._sums[start:stop, start:].addmm_(values[:, start:stop].T, values[:, start:])

    def _panels(self) -> Iterator[tuple[int, int]]:
        """Yield the first and last column of each strip."""
        width = len(self._sums)
        panel = max(-(-width // PANELS), NARROWEST)
        for start in range(0, width, panel):
            yield start, min(start + panel, width)
