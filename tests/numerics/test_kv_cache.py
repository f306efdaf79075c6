"""Ranges and scales of a key-value cache against loops over heads."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics.kv_cache import HeadRanges, through_cache
from angelslim.numerics.scheme import FORMATS, PER_HEAD, PER_TENSOR, Quant

TENSOR, HEAD = (Quant(FORMATS["fp8_e4m3"], granularity) for granularity in (PER_TENSOR, PER_HEAD))


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(2)
    loud = torch.tensor([1.0, 30.0, 0.1]).reshape(1, 3, 1, 1)
    return [torch.randn(1, 3, tokens, 4, generator=generator) * loud for tokens in (5, 1, 9)]


def test_scales_map_the_largest_magnitude_to_the_largest_code(states):
    ranges = HeadRanges()
    for each in states:
        ranges.update(each)
    every = torch.cat(states, dim=2)
    expected = torch.stack([every[:, head].abs().max() for head in range(3)]) / 448
    torch.testing.assert_close(ranges.scale(HEAD), expected.reshape(3, 1, 1))
    torch.testing.assert_close(ranges.scale(TENSOR), expected.max().reshape(1))


def test_processes_take_the_largest(states, monkeypatch):
    mine, theirs = HeadRanges(), HeadRanges()
    mine.update(states[0])
    theirs.update(states[2])
    others = iter([torch.tensor(3), theirs.amax])
    monkeypatch.setattr("angelslim.base.parallel.highest", lambda value: torch.maximum(value, next(others)))
    mine.merge()
    every = torch.cat([states[0], states[2]], dim=2)
    torch.testing.assert_close(mine.amax, every.abs().amax(dim=(0, 2, 3)))


def test_a_silent_head_gets_the_scale_1():
    ranges = HeadRanges()
    ranges.update(torch.tensor([0.0, -2.0]).reshape(1, 2, 1, 1))
    assert ranges.scale(HEAD).flatten().tolist() == [1.0, pytest.approx(2 / 448)]


@pytest.mark.parametrize("quant", [TENSOR, HEAD], ids=["tensor", "head"])
def test_the_cache_returns_rounded_values_in_the_type_of_the_model(states, quant):
    ranges = HeadRanges()
    ranges.update(states[0])
    scale = ranges.scale(quant)
    values = torch.cat(states, dim=2).to(torch.bfloat16)
    found = through_cache(values, scale, quant)
    per_head = scale.flatten().expand(3)
    for head in range(3):
        exact = values[:, head].float() / per_head[head]
        codes = exact.clamp(-448, 448).to(torch.float8_e4m3fn)  # later, larger values saturate
        assert torch.equal(found[:, head], (codes.float() * per_head[head]).to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
