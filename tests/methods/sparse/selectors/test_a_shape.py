"""A-shape: the token rule rounded up to blocks, per layer and per head."""

from __future__ import annotations

import pytest
from oracles import CASES, Case, check_rule

from angelslim.methods.sparse.selectors.base import SELECTORS


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_shape(case: Case) -> None:
    def rule(b: int, i: int, j: int) -> bool:
        return j - case.real(b)[0] < 20 or i - j < 35

    check_rule("a_shape", {"n_init": 20, "n_local": 35}, case, rule)


def test_settings_differ_by_layer_and_head() -> None:
    case = Case()
    selector = SELECTORS.get("a_shape")({"n_init": 1, "n_local": [16, 16, [16, 64], [32]]})
    q, k, v = case.tensors()
    rows = {layer: selector.select(q, k, v, case.context(layer)).num[0, :, -1].tolist() for layer in range(4)}
    assert rows[0] == rows[1] == [3, 3]
    assert rows[2] == [3, 6]
    assert rows[3] == [4, 4]


def test_a_density_scales_the_window() -> None:
    case = Case(queries=512, keys=512)
    options = {"n_init": 16, "n_local": 64, "density": 0.4}
    plan = SELECTORS.get("a_shape")(options).select(*case.tensors(), case.context())
    row = plan.to_mask()[0, 0, -1].int()
    assert row.diff().abs().sum() == 2, "a sink and a window, nothing between"
