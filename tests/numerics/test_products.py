"""Products with bfloat16 instructions against float64, wherever the tests run: such instructions or not."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics.products import TOGETHER, Quadratic, Squares, bfloat16_factors


def values(tokens: int = 300, width: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, width, generator=generator) * torch.rand(width, generator=generator) * 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [200, 64, 7])
@pytest.mark.parametrize("parts", [100, 700, TOGETHER])
def test_squares_of_inputs_lose_nothing(dtype, width, parts):
    inputs = values(TOGETHER + 300, width).to(dtype)
    squares = Squares(width)
    for part in inputs.split(parts):
        squares.add(part)
    assert_close(squares, inputs)
    squares.add(inputs[:5])  # goes on after it was looked at
    assert_close(squares, torch.cat([inputs, inputs[:5]]))


def test_parts_of_several_types_that_change_afterwards():
    inputs = values()
    squares = Squares(200)
    for part in (inputs[:100].bfloat16(), inputs[100:].clone()):
        squares.add(part)
        part.zero_()
    assert_close(squares, torch.cat([inputs[:100].bfloat16().float(), inputs[100:]]))


def test_rescaled_inputs():
    inputs, columns = values(), torch.arange(1, 201.0)
    squares = Squares(200)
    squares.add(inputs[:100])
    squares.rescale(columns)
    squares.add(inputs[100:])
    assert_close(squares, torch.cat([inputs[:100] / columns, inputs[100:]]))


def assert_close(squares: Squares, inputs: torch.Tensor) -> None:
    exact = inputs.double().T @ inputs.double()
    found = squares.whole()
    assert torch.equal(found, found.T)
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5 * exact.diagonal().mean().item())


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


@pytest.mark.parametrize("width", [7, 200, 300])
def test_the_quadratic_form_to_three_digits(width):
    inputs, rows = values(400, width), values(50, width)[:, torch.randperm(width)]
    hessian = inputs.T @ inputs / 400
    kept = hessian.clone()
    exact = ((rows.double() @ hessian.double()) * rows.double()).sum(1)
    found = Quadratic(hessian)(rows)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=1e-2)
    assert found.sum().item() == pytest.approx(exact.sum().item(), rel=2e-3)
    assert torch.equal(hessian, kept)
