"""Dilated: the sink and a stretched window with gaps of whole blocks."""

from __future__ import annotations

import pytest
from oracles import CASES, Case, check_rule

from angelslim.methods.sparse.selectors.base import SELECTORS


@pytest.mark.parametrize("case", [CASES["plain"], CASES["groups"], CASES["chunk"]])
def test_dilated(case: Case) -> None:
    def rule(b: int, i: int, j: int) -> bool:
        apart = i // 16 - j // 16
        return j < 20 or (apart < 2 * 3 and apart % 3 == 0)

    check_rule("dilated", {"n_init": 20, "window": 32, "dilation": 3}, case, rule)


def test_a_density_scales_the_window() -> None:
    case = Case(queries=512, keys=512)
    grid = SELECTORS.get("dilated")({"density": 0.2}).select(*case.tensors(), case.context()).to_mask()
    kept = [31 - j for j in grid[0, 0, -1].nonzero().flatten().tolist() if j]
    assert len(kept) > 1 and kept[::-1] == list(range(0, 2 * len(kept), 2))
