"""Static patterns: each is its token rule rounded up to blocks, per layer and per head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import CASES, Case, blocks_of_tokens, check

from angelslim.methods.sparse.selectors.base import SELECTORS


def token_mask(case: Case, rule: Callable[[int, int], bool]) -> torch.Tensor:
    """A rule on the positions of query and key, bool [Lq, Lk]."""
    offset = case.keys - case.queries
    return torch.tensor([[rule(offset + t, j) for j in range(case.keys)] for t in range(case.queries)])


def compare(name: str, options: dict[str, Any], case: Case, rule: Callable[[int, int, int], bool]) -> None:
    plan = SELECTORS.get(name)(options).select(*case.tensors(), case.context())
    wanted = {
        (b, h): blocks_of_tokens(case, b, token_mask(case, lambda i, j, b=b: rule(b, i, j)))
        for b in range(case.batch)
        for h in range(case.heads)
    }
    check(plan, case, wanted)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_shape(case: Case) -> None:
    def rule(b: int, i: int, j: int) -> bool:
        return j - case.real(b)[0] < 20 or i - j < 35

    compare("a_shape", {"n_init": 20, "n_local": 35}, case, rule)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tri_shape(case: Case) -> None:
    def rule(b: int, i: int, j: int) -> bool:
        return j - case.real(b)[0] < 20 or i - j < 35 or i >= case.real(b)[1] - 5

    compare("tri_shape", {"n_init": 20, "n_local": 35, "n_last": 5}, case, rule)


@pytest.mark.parametrize("case", [CASES["plain"], CASES["groups"], CASES["chunk"]])
def test_dilated(case: Case) -> None:
    def rule(b: int, i: int, j: int) -> bool:
        apart = i // 16 - j // 16
        return j < 20 or (apart < 2 * 3 and apart % 3 == 0)

    compare("dilated", {"n_init": 20, "window": 32, "dilation": 3}, case, rule)


@pytest.mark.parametrize("case", [CASES["plain"], CASES["groups"], CASES["chunk"]])
def test_strided(case: Case) -> None:
    def rule(b: int, i: int, j: int) -> bool:
        return j < 20 or i - j < 20 or (i // 16 - j // 16) % 3 == 0

    compare("strided", {"n_init": 20, "window": 20, "stride": 3}, case, rule)


def test_settings_differ_by_layer_and_head() -> None:
    case = Case()
    selector = SELECTORS.get("a_shape")({"n_init": 1, "n_local": [16, 16, [16, 64], [32]]})
    q, k, v = case.tensors()
    rows = {layer: selector.select(q, k, v, case.context(layer)).num[0, :, -1].tolist() for layer in range(4)}
    assert rows[0] == rows[1] == [3, 3]
    assert rows[2] == [3, 6]
    assert rows[3] == [4, 4]


def test_a_density_scales_the_widths() -> None:
    case = Case(queries=512, keys=512)
    q, k, v = case.tensors()
    window = SELECTORS.get("a_shape")({"n_init": 16, "n_local": 64, "density": 0.4}).select(
        q, k, v, case.context()
    )
    row = window.to_mask()[0, 0, -1].int()
    assert row.diff().abs().sum() == 2, "a sink and a window, nothing between"
    grid = SELECTORS.get("dilated")({"density": 0.2}).select(q, k, v, case.context()).to_mask()[0, 0, -1]
    kept = [31 - j for j in grid.nonzero().flatten().tolist() if j]
    assert kept and all(apart % 2 == 0 for apart in kept)
    strided = SELECTORS.get("strided")({"density": 0.2}).select(q, k, v, case.context()).to_mask()[0, 0, -1]
    apart = [31 - j for j in strided.nonzero().flatten().tolist()]
    assert 20 in apart and 1 in apart and 21 not in apart, "a grid of every 20th diagonal beside a window"


def test_triangle_reads_everything_last() -> None:
    case = Case(queries=1024, keys=1024)
    plan = SELECTORS.get("tri_shape")({"density": 0.2, "n_last": 16}).select(*case.tensors(), case.context())
    assert plan.num[0, 0, -1] == 64 and plan.num[0, 0, -2] < 16
    assert abs(plan.density() - 0.2) < 0.01
