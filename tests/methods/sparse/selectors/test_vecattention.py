"""VecAttention: single keys near the best of each group of queries, by loops; blocks that hold one of them."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import CASES, Case, check, heads_of, mean_of, real_places, rows_of

from angelslim.methods.sparse.selectors.vecattention import VecAttention, best_keys

ROWS, THRESHOLD = 4, 0.6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_with_a_key_near_the_best_are_kept(case: Case) -> None:
    q, k, v = case.tensors()
    plan = VecAttention({"rows": ROWS, "threshold": THRESHOLD}).select(q, k, v, case.context())
    wanted = {}
    for b, h, one_q, one_k, _ in heads_of(case, q, k, v):
        begin, end = case.real(b)
        offset = case.keys - case.queries
        blocks = wanted[b, h] = set()
        for i in rows_of(case, b):
            for group in range(i * 16, min((i + 1) * 16, case.queries), ROWS):
                places = real_places(case, b, group, ROWS, query=True)
                if not places:
                    continue
                mean, final = mean_of(one_q, places), offset + min(group + ROWS, case.queries) - 1
                score = {j: 0.5 * float(mean @ one_k[j]) for j in range(begin, end) if j <= final}
                least = max(score.values()) + math.log(THRESHOLD)
                blocks |= {(i, j // 16) for j, value in score.items() if value >= least}
    check(plan, case, wanted)


def test_one_key_that_a_group_asks_for_is_found() -> None:
    case = Case(queries=512, keys=512)
    q, k, v = case.tensors(width=16)
    q, k = q * 0.1, k * 0.1
    q[:, :, 320:336, 0] += 8.0
    k[:, :, 85, 0] += 8.0
    mask = VecAttention({"rows": 8}).select(q, k, v, case.context()).to_mask()
    assert mask[:, :, 20, 5].all()
    assert mask[:, :, 20].sum(-1).eq(3).all(), "the key's block, the sink and the diagonal"


def test_strips_do_not_change_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["groups"]
    q, k, _ = case.tensors()
    whole = best_keys(q, k, case.context(), ROWS)
    monkeypatch.setattr("angelslim.methods.sparse.selectors.vecattention.CELLS", 1)
    torch.testing.assert_close(best_keys(q, k, case.context(), ROWS), whole)
