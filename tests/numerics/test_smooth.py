"""SmoothQuant's scales and their search against float64."""

from __future__ import annotations

import pytest
import torch

from angelslim.numerics import smooth
from angelslim.numerics.scheme import PRESETS, Scheme
from angelslim.numerics.smooth import ALPHAS, Reader, rounded_input, search, smooth_scale

IN = 48
INT8 = PRESETS["int8_dynamic"]
STATIC = Scheme(INT8.weight, PRESETS["fp8_static"].input)


def weights(out: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, IN, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(outliers: float = 50.0) -> torch.Tensor:
    values = torch.randn(300, IN, generator=torch.Generator().manual_seed(1))
    values[:, :3] *= outliers
    return values


def test_the_scale_is_that_of_the_paper():
    amax, largest = inputs().abs().amax(0), weights().abs().amax(0)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        exact = amax.double() ** alpha / largest.double() ** (1 - alpha)
        assert torch.allclose(smooth_scale(amax, largest, alpha).double(), exact, rtol=1e-5)
    flat = inputs() / smooth_scale(amax, largest, 1.0)
    assert torch.allclose(flat.abs().amax(0), torch.ones(IN))


def test_dead_channels_keep_finite_scales():
    amax, largest = torch.ones(IN), torch.ones(IN)
    amax[0], largest[1] = 0, 0
    amax[2], largest[2] = 0, 0
    for alpha in ALPHAS:
        scale = smooth_scale(amax, largest, alpha)
        assert scale.isfinite().all() and scale.min() > 0


def lost(seen, scale, weight, scheme) -> float:
    """W8A8 in float64: a scale for each token and each output row."""
    x, w = seen.double() / scale.double(), weight.double() * scale.double()
    steps = (x.abs().amax(1, keepdim=True) / 127.5, w.abs().amax(1, keepdim=True) / 127.5)
    x, w = ((value / step).round().clamp(-128, 127) * step for value, step in zip((x, w), steps, strict=True))
    exact = seen.double() @ weight.double().T
    return ((x @ w.T - exact).square().sum(1) / exact.square().sum(1)).mean().item()


def test_the_search_finds_the_best_exponent_of_its_grid():
    seen, weight = inputs(), weights()
    amax, largest = seen.abs().amax(0), weight.abs().amax(0)
    best = search(seen, amax, largest, [Reader(weight, INT8, torch.float32)])
    every = {alpha: lost(seen, smooth_scale(amax, largest, alpha), weight, INT8) for alpha in ALPHAS}
    plain = lost(seen, torch.ones(IN), weight, INT8)
    # The largest value lies on a border between codes; float32 and float64 may take different sides.
    assert best.alpha is not None and best.loss == pytest.approx(min(every.values()), rel=0.05)
    assert best.loss == pytest.approx(every[best.alpha], rel=0.05)
    assert best.loss < 0.3 * plain
    assert torch.equal(best.scale, smooth_scale(amax, largest, best.alpha))


def test_no_scale_wins_where_nothing_is_gained():
    seen, weight = torch.zeros(20, IN), weights()
    best = search(seen, torch.zeros(IN), weight.abs().amax(0), [Reader(weight, INT8, torch.float32)])
    assert best.alpha is None and torch.equal(best.scale, torch.ones(IN))


@pytest.mark.parametrize("scheme", [INT8, STATIC, PRESETS["int4"], PRESETS["fp8_block"]])
def test_the_search_never_ends_above_no_scale(scheme, monkeypatch):
    seen, *matrices = (values.repeat(1, 8)[:, :128] for values in (inputs(4.0), weights(), weights(12, 2)))
    readers = [Reader(weight, scheme, torch.float32) for weight in matrices]
    amax = seen.abs().amax(0) * 1.5  # other tokens were larger than those of the sample
    largest = torch.stack([weight.abs().amax(0) for weight in matrices]).amax(0)
    best = search(seen, amax, largest, readers)
    monkeypatch.setattr(smooth, "ALPHAS", ())
    plain = search(seen, amax, largest, readers)
    assert plain.alpha is None and 0 < best.loss <= plain.loss
    assert (best.loss < plain.loss) == (best.alpha is not None)


def test_a_static_scale_covers_the_largest_of_all_tokens():
    scheme = STATIC.input
    assert scheme is not None
    amax = torch.tensor(448.0)
    values = torch.tensor([[448.0, 1.06, -0.3]])
    assert rounded_input(values, scheme, amax).tolist() == [[448.0, 1.0, -0.3125]]


def test_a_loud_token_does_not_decide_for_the_others():
    seen, weight = inputs(4.0), weights()
    readers = [Reader(weight, INT8, torch.float32)]
    largest = weight.abs().amax(0)
    quiet = search(seen, seen.abs().amax(0), largest, readers)
    loud = seen.clone()
    loud[0] *= 1000  # the statistics are kept apart: only the errors are weighed here
    heard = search(loud, seen.abs().amax(0), largest, readers)
    assert heard.alpha == quiet.alpha and heard.loss == pytest.approx(quiet.loss, rel=1e-3)
