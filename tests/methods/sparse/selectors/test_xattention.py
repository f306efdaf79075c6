"""XAttention: antidiagonals one pair at a time; far blocks at every length; the sink is a column."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import CASES, Case, allowed, check, fewest, forced, heads_of, own, rows_of
from torch import Tensor

from angelslim.base.errors import ConfigError
from angelslim.methods.sparse.selectors.xattention import XAttention, antidiagonal_masses

STRIDE = 4


def masses(case: Case, row: int, q: Tensor, k: Tensor) -> list[list[float]]:
    """The estimate of one head by its definition: antidiagonal means, causal softmax over tiles, sums in blocks."""
    begin, end = case.real(row)
    offset, per_block = case.keys - case.queries, case.block // STRIDE
    columns = -(-case.keys // case.block)
    table = [[0.0] * columns for _ in range(-(-case.queries // case.block))]
    for a in range(-(-case.queries // STRIDE)):
        scores = {}
        for c in range(-(-case.keys // STRIDE)):
            pairs = []
            for p in range(STRIDE):
                t, j = a * STRIDE + STRIDE - 1 - p, c * STRIDE + p
                if t < case.queries and begin <= offset + t < end and j < case.keys and begin <= j < end:
                    pairs.append(float(q[t] @ k[j]))
            if pairs and c * STRIDE <= offset + a * STRIDE:
                scores[c] = sum(pairs) / len(pairs) * 0.5
        total = sum(map(math.exp, scores.values()))
        for c, score in scores.items():
            table[a // per_block][c // per_block] += math.exp(score) / total
    return table


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_selection_is_the_papers(case: Case) -> None:
    q, k, v = case.tensors()
    plan = XAttention({"stride": STRIDE, "threshold": 0.6}).select(q, k, v, case.context())
    wanted = {}
    for b, h, one_q, one_k, _ in heads_of(case, q, k, v):
        table = masses(case, b, one_q, one_k)
        blocks = wanted[b, h] = set()
        for i in rows_of(case, b):
            here = [j for j in range(len(table[i])) if allowed(case, b, i, j)]
            first = [j for j in here if forced(case, b, i, j)]
            blocks |= {(i, j) for j in fewest(table[i], first, 0.6, here)}
            assert all(j in range(len(table[i])) for j in own(case, i))
    check(plan, case, wanted)


def test_strips_do_not_change_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["groups"]
    q, k, _ = case.tensors()
    whole = antidiagonal_masses(q, k, case.context(), STRIDE)
    monkeypatch.setattr("angelslim.methods.sparse.selectors.xattention.CELLS", 1)
    torch.testing.assert_close(antidiagonal_masses(q, k, case.context(), STRIDE), whole)


@pytest.mark.parametrize("length", [512, 768, 500, 752])
def test_a_strong_far_block_is_found_at_every_length(length: int) -> None:
    """A multiple of the public code's chunk (here 256) as well as other lengths: the far block is kept by all rows."""
    case = Case(queries=length, keys=length)
    q, k, v = case.tensors(width=16)
    q, k, far = q * 0.1, k * 0.1, 5
    q[..., 0] += 4.0
    k[:, :, far * 16 : (far + 1) * 16, 0] += 8.0
    mask = XAttention({"stride": 8, "threshold": 0.8}).select(q, k, v, case.context()).to_mask()
    assert mask[:, :, far:, far].all()
    assert mask.float().mean() < 0.5, "and the others are not"
    chunk = case.keys // 2 // 16 * 16
    context = Case(queries=length - chunk, keys=length).context()
    late = XAttention({"stride": 8, "threshold": 0.8}).select(q[:, :, chunk:], k, v, context).to_mask()
    assert torch.equal(late, mask[:, :, chunk // 16 :]), "a chunk gets the rows it would get at once"


def test_the_sink_is_a_column() -> None:
    case = Case(queries=512, keys=512)
    mask = XAttention({"threshold": 0.05}).select(*case.tensors(), case.context()).to_mask()
    assert mask[..., 0].all() and mask.diagonal(dim1=-2, dim2=-1).all()
    assert mask[:, :, 0].sum(-1).eq(1).all()


def test_heads_have_thresholds_of_their_own() -> None:
    case = Case(queries=256, keys=256)
    plan = XAttention({"threshold": [[0.2, 0.95]]}).select(*case.tensors(), case.context())
    assert plan.num[0, 0].sum() * 2 < plan.num[0, 1].sum()


def test_a_stride_that_does_not_fit_is_refused() -> None:
    case = Case()
    with pytest.raises(ConfigError, match="stride 5"):
        XAttention({"stride": 5}).select(*case.tensors(), case.context())
