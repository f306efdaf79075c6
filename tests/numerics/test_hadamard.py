"""Hadamard matrices are orthogonal, and multiplying with their factors is multiplying with the matrix."""

from __future__ import annotations

import math

import pytest
import torch

from angelslim.base.errors import ConfigError
from angelslim.numerics.hadamard import LARGEST_CORE, RADIX, hadamard, rotation

KINDS = ("hadamard", "random_hadamard", "orthogonal")
# Powers of two; widths of real models (Qwen2.5: 896, 3584; Gemma: 1152); odd ones, with no Hadamard matrix at all.
SIZES = (1, 2, 8, 128, 96, 896, 1152, 3, 15, 92)


def walsh(size: int) -> torch.Tensor:
    """Sylvester's matrix, entry by entry: -1 to the number of ones that row and column number share."""
    entries = [[(-1.0) ** (row & column).bit_count() for column in range(size)] for row in range(size)]
    return torch.tensor(entries, dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2, 4, 64, 12, 20, 24, 28, 36, 60, 76, 108, 140, 180])
def test_entries_are_signs_and_rows_are_orthogonal(order):
    matrix = hadamard(order)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [0, 3, 6, 10, 92])
def test_where_no_construction_is_known_there_is_none(order):
    assert hadamard(order) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_every_rotation_is_orthogonal(size, kind):
    matrix = rotation(size, kind, seed=3).matrix()
    assert (matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_fast_product_is_the_product_with_the_kronecker_product(size, kind):
    turn = rotation(size, kind, seed=5)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in turn.factors:
        matrix = torch.kron(matrix, factor)
    values = torch.randn(7, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(turn.apply(values), values * turn.signs @ matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 64, 2 * RADIX, RADIX * RADIX])
def test_powers_of_two_give_the_walsh_hadamard_transform(size):
    values = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = values @ walsh(size) / math.sqrt(size)
    assert torch.allclose(rotation(size, "hadamard").apply(values), expected, rtol=0, atol=1e-12)


def test_no_entry_of_a_hadamard_rotation_is_larger_than_another():
    for size in (96, 128, 896, 3584):
        row = torch.zeros(1, size, dtype=torch.float64)
        row[0, size // 3] = 1
        assert torch.allclose(
            rotation(size, "random_hadamard").apply(row).abs(), torch.full_like(row, size**-0.5)
        )


def test_runs_of_channels_are_rotated_by_themselves():
    turn = rotation(12, "random_hadamard", seed=1)
    values = torch.randn(4, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([turn.apply(part) for part in values.split(12, dim=1)], dim=1)
    assert torch.equal(turn.apply(values), expected)


def test_arithmetic_is_in_the_type_of_the_values():
    turn = rotation(896, "random_hadamard")
    values = torch.randn(4, 896, generator=torch.Generator().manual_seed(0))
    assert turn.apply(values).dtype == torch.float32
    assert torch.allclose(turn.apply(values).double(), turn.apply(values.double()), rtol=0, atol=1e-5)


def test_factors_stay_small():
    for size in (4096, 5120, 6656, 11008, 2880):
        turn = rotation(size, "hadamard")
        assert math.prod(len(factor) for factor in turn.factors) == size
        assert max(len(factor) for factor in turn.factors) <= LARGEST_CORE


def test_equal_seeds_give_equal_rotations():
    for kind in ("random_hadamard", "orthogonal"):
        first, same, other = (rotation(24, kind, seed).matrix() for seed in (1, 1, 2))
        assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(rotation(24, "hadamard", 1).matrix(), rotation(24, "hadamard", 2).matrix())


def test_a_rotation_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="0 channels"):
        rotation(0, "hadamard")
