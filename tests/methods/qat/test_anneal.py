"""Strengths that fade: their ends, their order, and what does not exist."""

from __future__ import annotations

import math

import pytest

from angelslim.methods.qat._anneal import strength


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_it_rises_to_the_peak_and_ends_at_zero(kind, warmup):
    values = [strength(step, 200, kind, warmup, 0.7) for step in range(201)]
    top = round(200 * warmup)
    assert values[200] == pytest.approx(0, abs=1e-12) and strength(500, 200, kind, warmup, 0.7) == values[200]
    assert values[: top + 1] == sorted(values[: top + 1]) and values[top:] == sorted(
        values[top:], reverse=True
    )
    assert max(values) == pytest.approx(0.7, rel=0.02)


def test_shapes_are_the_named_ones():
    assert strength(55, 100, "linear", 0.1, 1.0) == pytest.approx(0.5)
    assert strength(55, 100, "cosine", 0.1, 1.0) == pytest.approx(0.5)
    assert strength(325, 1000, "cosine", 0.1, 1.0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert strength(55, 100, "exponential", 0.1, 1.0) == pytest.approx(
        (math.exp(-2.5) - math.exp(-5)) / (1 - math.exp(-5))
    )
    assert strength(5, 100, "cosine", 0.1, 1.0) == pytest.approx(0.5)
    assert {strength(step, 100, "none", 0.1, 1.0) for step in range(101)} == {0.0}


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
def test_it_can_be_gone_before_the_run_is(kind):
    early = [strength(step, 200, kind, 0.1, 1.0, 0.5) for step in range(201)]
    assert early[99] > 0 and early[100:] == pytest.approx([0.0] * 101, abs=1e-12)
    whole = [strength(step, 200, kind, 0.2, 1.0) for step in range(201)]
    assert early[:101] == pytest.approx(whole[::2]), "the same shape in half the time"
    assert strength(100, 200, kind, 0.5, 1.0, 0.5) == pytest.approx(0.0)
