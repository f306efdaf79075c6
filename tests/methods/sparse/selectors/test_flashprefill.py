"""FlashPrefill: what the queries of a block draw from mean keys, one query at a time; a maximum instead of a sum."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import CASES, Case, allowed, check, heads_of, mean_of, own, real_places, rows_of

from angelslim.methods.sparse.selectors.flashprefill import FlashPrefill, drawn

OPTIONS = {"alpha": 0.7, "sink": 20, "window": 20, "last_blocks": 1}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_near_the_best_are_kept(case: Case) -> None:
    q, k, v = case.tensors()
    plan = FlashPrefill(OPTIONS).select(q, k, v, case.context())
    wanted = {}
    for b, h, one_q, one_k, _ in heads_of(case, q, k, v):
        begin, end = case.real(b)
        offset = case.keys - case.queries
        blocks = wanted[b, h] = set()
        for i in rows_of(case, b):
            here = [j for j in range(-(-case.keys // 16)) if allowed(case, b, i, j)]
            score = {
                j: sum(
                    math.exp(
                        0.5 * float(one_q[t] @ mean_of(one_k, real_places(case, b, j * 16, 16, query=False)))
                    )
                    for t in real_places(case, b, i * 16, 16, query=True)
                )
                for j in here
            }
            late = offset + min((i + 1) * 16, case.queries) - 1 >= end - 16
            for j in here:
                near = j > own(case, i)[0] - 2 or j < begin // 16 + 2
                if late or near or score[j] >= 0.7 * max(score.values()):
                    blocks.add((i, j))
    check(plan, case, wanted)


def test_a_block_that_is_asked_for_is_found_and_large_scores_do_not_overflow() -> None:
    case = Case(queries=512, keys=512)
    q, k, v = case.tensors(width=16)
    q, k = q * 0.1, k * 0.1
    q[..., 0] += 40.0
    k[:, :, 80:96, 0] += 40.0
    mask = (
        FlashPrefill({"sink": 16, "window": 16, "last_blocks": 0}).select(q, k, v, case.context()).to_mask()
    )
    assert mask[:, :, 5:, 5].all() and mask.float().mean() < 0.25


def test_strips_do_not_change_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["groups"]
    q, k, _ = case.tensors()
    whole = drawn(q, k, case.context())
    monkeypatch.setattr("angelslim.methods.sparse.selectors.flashprefill.CELLS", 1)
    torch.testing.assert_close(drawn(q, k, case.context()), whole)
