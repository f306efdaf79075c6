"""Strided: the sink, a window and a grid of block diagonals."""

from __future__ import annotations

import pytest
from oracles import CASES, Case, check_rule

from angelslim.methods.sparse.selectors.base import SELECTORS


@pytest.mark.parametrize("case", [CASES["plain"], CASES["groups"], CASES["chunk"]])
def test_strided(case: Case) -> None:
    def rule(b: int, i: int, j: int) -> bool:
        return j < 20 or i - j < 20 or (i // 16 - j // 16) % 3 == 0

    check_rule("strided", {"n_init": 20, "window": 20, "stride": 3}, case, rule)


def test_a_density_makes_the_grid_coarser() -> None:
    case = Case(queries=512, keys=512)
    plan = SELECTORS.get("strided")({"density": 0.2}).select(*case.tensors(), case.context())
    apart = [31 - j for j in plan.to_mask()[0, 0, -1].nonzero().flatten().tolist()]
    assert 20 in apart and 1 in apart and 21 not in apart, "every 20th diagonal, and a window"
