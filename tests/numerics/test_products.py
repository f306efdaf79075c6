"""Products with bfloat16 instructions against float64, wherever the tests run: such instructions or not."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics.products import add_squares, bfloat16_factors, mirrored


def values(tokens: int = 300, width: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, width, generator=generator) * torch.rand(width, generator=generator) * 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [200, 64, 7])
def test_squares_of_inputs_lose_nothing(dtype, width):
    inputs = values(width=width).to(dtype)
    sums = torch.zeros(width, width)
    for part in inputs.split(100):
        add_squares(sums, part)
    exact = inputs.double().T @ inputs.double()
    assert torch.allclose(
        mirrored(sums).double(), exact, rtol=1e-5, atol=1e-5 * exact.diagonal().mean().item()
    )


def test_half_of_the_sums_is_mirrored():
    sums = torch.arange(9.0).view(3, 3)
    assert torch.equal(mirrored(sums), torch.tensor([[0.0, 1, 2], [1, 4, 5], [2, 5, 8]]))
    assert torch.equal(sums, torch.arange(9.0).view(3, 3))


def test_three_digits_are_left_and_the_switch_goes_back():
    first, second = values(), values(200, 150)
    before = first @ second
    with bfloat16_factors():
        close = first @ second
    assert (close - before).norm() < 0.01 * before.norm()
    with pytest.raises(ZeroDivisionError), bfloat16_factors():
        _ = 1 / 0
    assert torch.equal(first @ second, before)
    with bfloat16_factors(False):
        assert torch.equal(first @ second, before)
