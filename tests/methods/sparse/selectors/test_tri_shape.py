"""Tri-shape: A-shape with whole last rows, rounded up to blocks."""

from __future__ import annotations

import pytest
from oracles import CASES, Case, check_rule

from angelslim.methods.sparse.selectors.base import SELECTORS


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tri_shape(case: Case) -> None:
    def rule(b: int, i: int, j: int) -> bool:
        return j - case.real(b)[0] < 20 or i - j < 35 or i >= case.real(b)[1] - 5

    check_rule("tri_shape", {"n_init": 20, "n_local": 35, "n_last": 5}, case, rule)


def test_triangle_reads_everything_last() -> None:
    case = Case(queries=1024, keys=1024)
    plan = SELECTORS.get("tri_shape")({"density": 0.2, "n_last": 16}).select(*case.tensors(), case.context())
    assert plan.num[0, 0, -1] == 64 and plan.num[0, 0, -2] < 16
    assert abs(plan.density() - 0.2) < 0.01
