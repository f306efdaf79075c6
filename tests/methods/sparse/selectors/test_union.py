"""Union: its three estimates by their definition, and needles that pooled scores miss."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import CASES, Case, allowed, attention, heads_of, last_queries, mean_of, real_places, rows_of
from torch import Tensor

from angelslim.base.errors import ConfigError
from angelslim.methods.sparse.plan import BlockPlan
from angelslim.methods.sparse.selectors.base import SELECTORS
from angelslim.methods.sparse.selectors.union import Union, cell_masses, cells_for, last_row_masses


def cells_by_hand(case: Case, row: int, q: Tensor, k: Tensor, size: int) -> list[list[float]]:
    offset, n = case.keys - case.queries, -(-case.keys // 16)
    table = [[0.0] * n for _ in range(-(-case.queries // 16))]
    for a in range(-(-case.queries // size)):
        mean_q = mean_of(q, real_places(case, row, a * size, size, query=True))
        final = offset + min((a + 1) * size, case.queries) - 1
        scores = {}
        for c in range(-(-case.keys // size)):
            places = real_places(case, row, c * size, size, query=False)
            if c * size <= final and places:
                scores[c] = 0.5 * float(mean_q @ mean_of(k, places))
        masses = [0.0] * n
        total = sum(map(math.exp, scores.values()))
        for c, score in scores.items():
            masses[c * size // 16] += math.exp(score) / total
        i = a * size // 16
        table[i] = [x + y * y * size / 16 for x, y in zip(table[i], masses, strict=True)]
    return [[math.sqrt(x) for x in line] for line in table]


def last_by_hand(case: Case, row: int, q: Tensor, k: Tensor, last: int) -> list[list[float]]:
    offset, n = case.keys - case.queries, -(-case.keys // 16)
    weights, asking = attention(case, row, q, k), last_queries(case, row, last)
    table = [[0.0] * n for _ in range(-(-case.queries // 16))]
    masses = [[float(weights[t, j * 16 : j * 16 + 16].sum()) for j in range(n)] for t in asking]
    slash = [0.0] * case.keys
    for t in asking:
        for j in range(offset + t + 1):
            slash[offset + t - j] += float(weights[t, j]) / len(asking)
    for i in range(len(table)):
        ends_at = min((i + 1) * 16, case.queries) - 1
        for j in range(n):
            each = [mass[j] for mass in masses]
            column = max(each) if ends_at >= asking[0] else 0.25 * sum(each) / len(each)
            # of the 16 pairs that a diagonal has in a row of blocks, those that lie in this block
            pairs = [offset + i * 16 + s - (j * 16 + u) for s in range(16) for u in range(16)]
            table[i][j] = column + 0.25 * sum(slash[d] / 16 for d in pairs if 0 <= d < case.keys)
    return table


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_estimates_are_what_they_say(case: Case) -> None:
    q, k, v = case.tensors()
    cells = cell_masses(q, k, case.context(), 4)
    last = last_row_masses(q, k, case.context(), 10)
    for b, h, one_q, one_k, _ in heads_of(case, q, k, v):
        wanted_cells, wanted_last = (
            cells_by_hand(case, b, one_q, one_k, 4),
            last_by_hand(case, b, one_q, one_k, 10),
        )
        for i in rows_of(case, b):
            for j in range(len(wanted_cells[i])):
                if allowed(case, b, i, j):
                    assert float(cells[b, h, i, j]) == pytest.approx(wanted_cells[i][j], abs=1e-5)
                    assert float(last[b, h, i, j]) == pytest.approx(wanted_last[i][j], abs=1e-5)


def test_strips_do_not_change_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["groups"]
    q, k, _ = case.tensors()
    whole = cell_masses(q, k, case.context(), 4)
    monkeypatch.setattr("angelslim.methods.sparse.selectors.union.MAP_CELLS", 1)
    torch.testing.assert_close(cell_masses(q, k, case.context(), 4), whole)


def needle(asking: range, tokens: range, length: int = 1024) -> tuple[Case, Tensor, Tensor, Tensor]:
    """Noise, and a needle of a few keys that only a few queries ask for, and get most of their mass from."""
    case = Case(heads=4, kv_heads=2, queries=length, keys=length, block=32)
    q, k, v = case.tensors(seed=1, width=64)
    direction = torch.randn(64)
    direction /= direction.norm()
    context = case.context()
    q, k = q / (context.scaling * 8), k
    for j in tokens:
        k[:, :, j] = direction * 8
    for t in asking:
        q[:, :, t] = direction * 3
    return case, q, k, v


def kept(plan: BlockPlan, asking: range, tokens: range) -> float:
    return float(plan.to_mask()[:, :, asking[0] // 32, tokens[0] // 32].float().mean())


def test_a_short_needle_of_few_queries_is_found() -> None:
    tokens = range(330, 331)
    for asking in (range(1020, 1021), range(1000, 1002)):
        case, q, k, v = needle(asking, tokens)
        weights = attention(case, 0, q[0, 0].double(), k[0, 0].double())
        assert float(weights[asking[0], tokens[0]]) > 0.8
        found = {
            name: kept(SELECTORS.get(name)({"density": 0.2}).select(q, k, v, case.context()), asking, tokens)
            for name in ("union", "uniform", "stem", "xattention")
        }
        assert found["union"] == 1.0
        assert max(found[name] for name in ("uniform", "stem", "xattention")) < 1.0, found


def test_cells_see_needles_in_the_middle_that_means_hide() -> None:
    asking, tokens = range(640, 644), range(328, 332)
    case, q, k, v = needle(asking, tokens)
    found = {
        cells: kept(Union({"density": 0.2, "cells": cells}).select(q, k, v, case.context()), asking, tokens)
        for cells in (1, 4)
    }
    assert found[4] == 1.0 > found[1]


def test_native_budget_keeps_the_last_rows_whole() -> None:
    case = Case(queries=1024, keys=1024)
    q, k, v = case.tensors()
    plan = Union({"mass": 0.3}).select(q, k, v, case.context())
    assert plan.num[..., -2:].tolist() == [[[63, 64], [63, 64]]]
    assert int(plan.num[..., 20:-2].max()) < 40
    assert plan.to_mask()[..., 1:, :].diagonal(dim1=-2, dim2=-1).all(), "a window of two blocks"


def test_cells_must_fit() -> None:
    assert [cells_for(128, length) for length in (8192, 65536, 131072, 10**7)] == [8, 8, 4, 1]
    assert cells_for(20, 1000) == 4
    case = Case()
    with pytest.raises(ConfigError, match="3 cells"):
        Union({"cells": 3}).select(*case.tensors(), case.context())
