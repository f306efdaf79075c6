"""FlexPrefill: both kinds of heads by their definition, and a head of each kind recognised."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import (
    CASES,
    Case,
    allowed,
    attention,
    check,
    heads_of,
    last_queries,
    mean_of,
    real_places,
    rows_of,
)
from torch import Tensor

from angelslim.methods.sparse.selectors.flexprefill import FlexPrefill, divergence

LAST, LEAST, GAMMA = 12, 32, 0.7


def softmax(scores: dict[int, float]) -> dict[int, float]:
    total = sum(map(math.exp, scores.values()))
    return {j: math.exp(score) / total for j, score in scores.items()}


def pooled(case: Case, row: int, mean_q: Tensor, k: Tensor, here: list[int]) -> dict[int, float]:
    return softmax(
        {j: 0.5 * float(mean_q @ mean_of(k, real_places(case, row, j * 16, 16, query=False))) for j in here}
    )


def count_for(weights: list[float]) -> int:
    """Blocks' worth of the tokens that hold GAMMA, plus one."""
    total, held, count = sum(weights), 0.0, 0
    for weight in sorted(weights, reverse=True):
        held, count = held + weight, count + 1
        if held >= GAMMA * total:
            break
    return max(count // 16 + 1, LEAST // 16)


def reference(case: Case, row: int, q: Tensor, k: Tensor, tau: float) -> set[tuple[int, int]]:
    offset, n = case.keys - case.queries, -(-case.keys // 16)
    weights, asking = attention(case, row, q, k), last_queries(case, row, LAST)
    columns, diagonals = [0.0] * (n * 16), [0.0] * (n * 16)
    for t in asking:
        for j in range(offset + t + 1):
            columns[j] += float(weights[t, j]) / len(asking)
            diagonals[offset + t - j] += float(weights[t, j]) / len(asking)
    block_columns = [sum(columns[j * 16 : j * 16 + 16]) for j in range(n)]
    block_diagonals = [sum(diagonals[j * 16 : j * 16 + 16]) for j in range(n)]
    begin, end = case.real(row)
    seen = [j for j in range(n) if j * 16 < end and (j + 1) * 16 > begin]
    guess = pooled(case, row, mean_of(q, asking), k, seen)
    terms = 0.0
    for j in range(n):
        p, true = guess.get(j, 0.0), block_columns[j]
        for value in (p, true):
            terms += value / 2 * math.log(value / ((p + true) / 2)) if value else 0.0
    aware = math.sqrt(max(terms, 0)) < tau
    counts = [LEAST // 16] * 2 if aware else [count_for(columns), count_for(diagonals)]
    vertical = sorted(range(n), key=lambda j: -block_columns[j])[: counts[0]]
    slash = sorted(range(n), key=lambda j: -block_diagonals[j])[: counts[1]]
    blocks = {
        (i, j)
        for i in range(-(-case.queries // 16))
        for j in range(n)
        if j in vertical or (offset + i * 16) // 16 - j in slash
    }
    if aware:
        mass = {}
        for i in range(-(-case.queries // 16)):
            here = [j for j in range(n) if allowed(case, row, i, j)]
            mean_q = mean_of(q, real_places(case, row, i * 16, 16, query=True))
            mass |= {(i, j): p for j, p in pooled(case, row, mean_q, k, here).items()}
        held, total = 0.0, sum(mass.values())
        for place in sorted(mass, key=lambda at: -mass[at]):
            if held < GAMMA * total:
                blocks.add(place)
            held += mass[place]
    return blocks


@pytest.mark.parametrize("tau", [0.0, 10.0], ids=["vertical-slash", "query-aware"])
@pytest.mark.parametrize(
    "case", [c for n, c in CASES.items() if n != "padded left"], ids=lambda c: f"{c.keys}"
)
def test_selection_is_the_papers(case: Case, tau: float) -> None:
    q, k, v = case.tensors()
    q = q * 2
    options = {"gamma": GAMMA, "tau": tau, "min_budget": LEAST, "last": LAST}
    plan = FlexPrefill(options).select(q, k, v, case.context())
    wanted = {
        (b, h): reference(case, b, one_q, one_k, tau) for b, h, one_q, one_k, _ in heads_of(case, q, k, v)
    }
    assert rows_of(case, 0)
    check(plan, case, wanted)


def test_padding_on_the_left_changes_nothing() -> None:
    """Three blocks of padding: the rows behind them are those of the prompt alone."""
    alone, padded = Case(queries=160, keys=160), Case(queries=208, keys=208, start=(48,))
    for tau in (0.0, 10.0):
        q, k, v = alone.tensors()
        selector = FlexPrefill({"tau": tau, "min_budget": LEAST, "last": LAST, "gamma": GAMMA})
        expected = selector.select(q, k, v, alone.context()).to_mask()
        wide = [torch.cat([torch.randn_like(x[:, :, :48]), x], 2) for x in (q, k, v)]
        found = selector.select(*wide, padded.context()).to_mask()
        assert torch.equal(found[:, :, 3:, 3:], expected)
        assert not found[:, :, 3:, :3].any()


def test_heads_of_both_kinds_are_recognised() -> None:
    """Head 0 asks for whole blocks, as pooled means can tell; head 1 for single keys, which a mean hides."""
    case = Case(queries=512, keys=512)
    q, k, v = case.tensors(width=16)
    q, k = q * 0.05, k * 0.05
    wanted = torch.arange(512) // 16 % 4
    for kind in range(4):
        k[:, 0, wanted == kind, kind] += 4.0
        q[:, 0, wanted == kind, (kind + 1) % 4] += 4.0
    k[:, 1, 100, 5], q[:, 1, :, 5] = 30.0, 3.0
    selector = FlexPrefill({"min_budget": 16, "last": 16})
    mask = selector.select(q, k, v, case.context()).to_mask()[0]
    later = torch.arange(8, 32)
    asks = (later[:, None] + 1) % 4 == torch.arange(32) % 4
    asks &= torch.arange(32) <= later[:, None]
    assert mask[0, 8:][asks].float().mean() > 0.8, "each row has blocks of its own"
    assert mask[1, 7:, 100 // 16].all() and mask[1].sum() < 140
    forced_lines = FlexPrefill({"min_budget": 16, "last": 16, "tau": 0.0})
    lines = forced_lines.select(q, k, v, case.context()).to_mask()[0]
    assert torch.equal(lines[1], mask[1]) and not torch.equal(lines[0], mask[0])


def test_the_divergence() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert float(divergence(p, p)) == 0.0
    assert float(divergence(p, q)) == pytest.approx(math.sqrt(0.5 * math.log(2)), rel=1e-6)


def test_short_prompts_are_dense() -> None:
    case = Case()
    assert FlexPrefill({}).select(*case.tensors(), case.context()).density() == 1.0
    assert (
        FlexPrefill({"min_budget": 16, "gamma": 0.3}).select(*case.tensors(), case.context()).density() < 1.0
    )
