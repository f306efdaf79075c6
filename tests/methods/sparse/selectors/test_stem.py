"""Stem: the factorised logits are the long form; value sizes, decay and the keep ratio do what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import CASES, Case, allowed, check, heads_of, own, rows_of
from torch import Tensor

from angelslim.methods.sparse.selectors.stem import (
    Stem,
    base_count,
    block_logits,
    position_decay,
    value_bonus,
)

STRIDE = 4


def long_form(q: Tensor, k: Tensor, block: int, scaling: float) -> Tensor:
    """The mean of the map of antidiagonal scores over each block's tiles, [L / block, L / block]; q and k [L, D]."""
    tiles_q = q.unflatten(0, (-1, STRIDE)).flip(1)
    tiles_k = k.unflatten(0, (-1, STRIDE))
    tiles = torch.einsum("apd,cpd->ac", tiles_q, tiles_k) * scaling / STRIDE
    size = block // STRIDE
    return tiles.unflatten(0, (-1, size)).unflatten(2, (-1, size)).mean((1, 3))


def logit(case: Case, row: int, q: Tensor, k: Tensor, i: int, j: int) -> float:
    """One block's logit with short and padded blocks: the mean for each p, then over the p that both blocks have."""
    begin, end = case.real(row)
    offset, b, means = case.keys - case.queries, case.block, []
    for p in range(STRIDE):
        asked = [t for t in range(i * b + STRIDE - 1 - p, (i + 1) * b, STRIDE) if t < case.queries]
        asked = [t for t in asked if begin <= offset + t < end]
        keys = [s for s in range(j * b + p, (j + 1) * b, STRIDE) if s < case.keys and begin <= s < end]
        if asked and keys:
            means.append(sum(float(q[t] @ k[s]) for t in asked for s in keys) / len(asked) / len(keys))
    return 0.5 * sum(means) / max(len(means), 1)


def bonus(case: Case, row: int, v: Tensor) -> list[float]:
    begin, end = case.real(row)
    logs = {}
    for c in range(-(-case.keys // STRIDE)):
        norms = [float(v[t].norm()) for t in range(c * STRIDE, (c + 1) * STRIDE) if begin <= t < end]
        if norms:
            logs[c] = math.log(max(norms) + 1e-6)
    mean = sum(logs.values()) / len(logs)
    spread = math.sqrt(sum((value - mean) ** 2 for value in logs.values()) / len(logs))
    found = []
    for j in range(-(-case.keys // case.block)):
        here = [c for c in logs if c * STRIDE // case.block == j]
        found.append(sum(max((logs[c] - mean) / spread, 0) for c in here) / max(len(here), 1))
    return found


def test_factorised_logits_are_the_long_form() -> None:
    case = Case(queries=256, keys=256, block=32)
    q, k, v = case.tensors()
    found = block_logits(q, k, case.context(), STRIDE)
    for b, h, one_q, one_k, _ in heads_of(case, q, k, v):
        torch.testing.assert_close(found[b, h].double(), long_form(one_q, one_k, 32, 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_and_bonus_of_short_and_padded_blocks(case: Case) -> None:
    q, k, v = case.tensors()
    logits = block_logits(q, k, case.context(), STRIDE)
    values = value_bonus(v, case.context(), STRIDE)
    group = case.heads // case.kv_heads
    for b, h, one_q, one_k, one_v in heads_of(case, q, k, v):
        expected = bonus(case, b, one_v)
        assert values[b, h // group].tolist() == pytest.approx(expected, abs=1e-5)
        for i in rows_of(case, b):
            for j in range(logits.shape[-1]):
                if allowed(case, b, i, j):
                    assert float(logits[b, h, i, j]) == pytest.approx(
                        logit(case, b, one_q, one_k, i, j), abs=1e-5
                    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_selection_is_the_papers(case: Case) -> None:
    q, k, v = case.tensors()
    options = {"stride": STRIDE, "keep_ratio": 0.5, "initial_blocks": 1, "window_blocks": 2, "lambda": 0.3}
    plan = Stem(options).select(q, k, v, case.context())
    wanted = {}
    for b, h, one_q, one_k, one_v in heads_of(case, q, k, v):
        begin, end = case.real(b)
        sink, blocks = begin // case.block, set()
        count = -(-end // case.block) - sink
        extra = bonus(case, b, one_v)
        first = max(round(0.5 * count), 1)
        budgets = [first] * first + np.floor(np.linspace(first, 0.7 * first, count - first) + 1e-9).tolist()
        for i in rows_of(case, b):
            here = [j for j in range(len(extra)) if allowed(case, b, i, j)]
            score = {j: logit(case, b, one_q, one_k, i, j) + 0.3 * extra[j] for j in here}
            near = {j for j in here if j == sink or j in own(case, i) or j == own(case, i)[0] - 1}
            always = {sink, *own(case, i)}
            order = sorted(here, key=lambda j: (j not in always, -score[j]))
            place = (case.keys - case.queries) // case.block + i - sink
            kept = set(order[: int(max(budgets[min(place, count - 1)], 1))]) | near
            blocks |= {(i, j) for j in kept}
        wanted[b, h] = blocks
    check(plan, case, wanted)


def test_counts_of_the_schedule() -> None:
    assert [base_count(n, None) for n in (55, 56, 159, 160, 1024)] == [55, 41, 61, 46, 132]
    counts = position_decay(1024, None, 0.7)
    assert counts[:3] == (1, 2, 3) and counts[131] == counts[132] == 132
    assert counts[-1] == 92 and list(counts[132:]) == sorted(counts[132:], reverse=True)
    assert set(position_decay(1024, None, 1.0)[131:]) == {132}


def test_the_keep_ratio_changes_the_density() -> None:
    case = Case(queries=1024, keys=1024)
    q, k, v = case.tensors()
    found = [
        Stem({"keep_ratio": ratio, "initial_blocks": 1, "window_blocks": 1})
        .select(q, k, v, case.context())
        .density()
        for ratio in (0.05, 0.2, 0.6, 1.0)
    ]
    assert found[0] < 0.12 < found[1] < 0.4 < found[2] < found[3] == 1.0


def test_early_layers_are_dense_and_rows_decay() -> None:
    case = Case(queries=1024, keys=1024)
    q, k, v = case.tensors()
    assert Stem({}).select(q, k, v, case.context(layer=1)).density() == 1.0
    assert Stem({}).select(q, k, v, case.context(layer=2)).density() < 1.0
    ratios = {"keep_ratio": [1.0, 0.3, 0.3, 0.3]}
    assert Stem(ratios).select(q, k, v, case.context(layer=0)).density() == 1.0
    for decay, last in ((True, 3), (False, 0)):
        plan = Stem({"density": 0.3, "tpd": decay, "alpha": 0.5}).select(q, k, v, case.context())
        assert abs(plan.density() - 0.3) < 0.01
        assert (plan.num[0, 0].max() - plan.num[0, 0, -1] > last) == decay


def test_loud_values_are_kept_when_outputs_count() -> None:
    case = Case(queries=512, keys=512)
    q, k, v = case.tensors()
    q, k = q * 0.1, k * 0.1
    v[:, :, 160:176] *= 50
    kept = {
        oam: Stem({"density": 0.2, "oam": oam, "lambda": 1.0})
        .select(q, k, v, case.context())
        .to_mask()[:, :, 12:, 10]
        .float()
        .mean()
        for oam in (True, False)
    }
    assert kept[True] == 1.0 and kept[False] < 0.5


def test_a_chunk_gets_the_rows_it_would_get_at_once() -> None:
    whole, chunk = Case(queries=1024, keys=1024), Case(queries=256, keys=512)
    q, k, v = whole.tensors()
    for options in ({"oam": False}, {"oam": False, "density": 0.2}):
        at_once = Stem(options).select(q, k, v, whole.context()).to_mask()
        part = Stem(options).select(
            q[:, :, 256:512], k[:, :, :512], v[:, :, :512], chunk.context(prompt_len=1024)
        )
        assert torch.equal(part.to_mask(), at_once[:, :, 16:32, :32])
