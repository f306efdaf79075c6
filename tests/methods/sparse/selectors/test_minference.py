"""MInference: columns and diagonals of the last queries, token by token; pattern files; the offline search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracles import (
    CASES,
    Case,
    allowed,
    attention,
    blocks_of_tokens,
    check,
    forced,
    heads_of,
    last_queries,
    mean_of,
    real_places,
    rows_of,
)
from torch import Tensor

from angelslim.base.errors import ConfigError
from angelslim.methods.sparse._patterns import HeadPattern, read_patterns, write_patterns
from angelslim.methods.sparse._search import search_heads
from angelslim.methods.sparse.selectors.minference import MInference

OPTIONS = {"vertical": 30, "slash": 50, "last": 12, "first_columns": 3, "near": 5}


def sums(case: Case, row: int, q: Tensor, k: Tensor) -> tuple[list[float], list[float]]:
    """The mass of the last 12 queries by column and by distance."""
    weights, offset = attention(case, row, q, k), case.keys - case.queries
    columns, diagonals = [0.0] * case.keys, [0.0] * case.keys
    for t in last_queries(case, row, 12):
        for j in range(offset + t + 1):
            columns[j] += float(weights[t, j])
            diagonals[offset + t - j] += float(weights[t, j])
    return columns, diagonals


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_columns_and_slashes_are_the_papers(case: Case) -> None:
    q, k, v = case.tensors()
    plan = MInference(OPTIONS).select(q, k, v, case.context())
    wanted = {}
    for b, h, one_q, one_k, _ in heads_of(case, q, k, v):
        columns, diagonals = sums(case, b, one_q, one_k)
        begin, offset = case.real(b)[0], case.keys - case.queries
        first = range(begin, begin + 3)
        order = sorted(range(case.keys), key=lambda j: (j not in first, -columns[j]))
        apart = sorted(range(case.keys), key=lambda d: (d >= 5, -diagonals[d]))
        vertical, slash = set(order[:30]), set(apart[:50])
        keep = torch.tensor(
            [
                [j in vertical or offset + t - j in slash for j in range(case.keys)]
                for t in range(case.queries)
            ]
        )
        blocks = blocks_of_tokens(case, b, keep)
        # A chosen column belongs to all rows, also to those of its own block before it.
        wanted[b, h] = blocks | {(i, j // 16) for i in rows_of(case, b) for j in vertical}
    check(plan, case, wanted)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_block_sparse_heads_are_the_papers(case: Case) -> None:
    q, k, v = case.tensors()
    plan = MInference({"kind": "block_sparse", "blocks": 3}).select(q, k, v, case.context())
    wanted = {}
    for b, h, one_q, one_k, _ in heads_of(case, q, k, v):
        blocks = wanted[b, h] = set()
        for i in rows_of(case, b):
            mean_q = mean_of(one_q, real_places(case, b, i * 16, 16, query=True))
            here = [j for j in range(-(-case.keys // 16)) if allowed(case, b, i, j)]
            score = {
                j: float(mean_q @ mean_of(one_k, real_places(case, b, j * 16, 16, query=False))) for j in here
            }
            order = sorted(here, key=lambda j: (not forced(case, b, i, j), -score[j]))
            blocks |= {(i, j) for j in order[:3]}
    check(plan, case, wanted)


def planted(length: int = 512) -> tuple[Case, Tensor, Tensor, Tensor, int, int]:
    """A column and a slash: key 200 attracts every query, and query t asks for the key 160 tokens before it."""
    case = Case(heads=1, kv_heads=1, queries=length, keys=length)
    torch.manual_seed(0)
    column, distance = 200, 160
    angle = torch.arange(length) * 0.7
    rotary = torch.stack([(angle * f).cos() for f in (1, 1.618, 2.414, 3.3)], -1)
    turned = torch.stack([(angle * f).sin() for f in (1, 1.618, 2.414, 3.3)], -1)
    k = torch.cat([rotary, turned, torch.zeros(length, 1)], -1)
    q = torch.cat([rotary.roll(distance, 0), turned.roll(distance, 0), torch.full((length, 1), 0.5)], -1) * 6
    k[column, -1] = 8.0
    return case, q[None, None], k[None, None], torch.randn(1, 1, length, 9), column, distance


@pytest.mark.parametrize("density", [None, 0.3])
def test_a_column_and_a_slash_are_found(density: float | None) -> None:
    case, q, k, v, column, distance = planted()
    options = {**OPTIONS, "rounding": "count", "density": density, "vertical": 30, "slash": 50}
    mask = MInference(options).select(q, k, v, case.context()).to_mask()[0, 0]
    rows = torch.arange(16, 32)
    assert mask[rows, column // 16].all()
    assert mask[rows, rows - distance // 16].all()
    assert mask.tril().sum() < 0.6 * torch.ones_like(mask).tril().sum()


def test_counting_costs_less_than_covering() -> None:
    case = Case(queries=512, keys=512)
    found = [
        MInference({**OPTIONS, "rounding": rounding}).select(*case.tensors(), case.context()).density()
        for rounding in ("count", "cover")
    ]
    assert found[0] < 0.35 < found[1]


def test_heads_follow_the_pattern_file(tmp_path: Path) -> None:
    case = Case(queries=512, keys=512)
    q, k, v = case.tensors()
    layer = (HeadPattern("stream_llm", 16, 32, 0.5), HeadPattern("block_sparse", 4, 0, 0.9))
    write_patterns(tmp_path / "patterns.json", [layer] * 4)
    plan = MInference({"patterns": str(tmp_path / "patterns.json")}).select(q, k, v, case.context())
    alone = [
        MInference({"kind": "stream_llm", "vertical": 16, "slash": 32}).select(q, k, v, case.context()),
        MInference({"kind": "block_sparse", "blocks": 4}).select(q, k, v, case.context()),
    ]
    mask = plan.to_mask()
    assert torch.equal(mask[:, 0], alone[0].to_mask()[:, 0])
    assert torch.equal(mask[:, 1], alone[1].to_mask()[:, 1])
    with pytest.raises(ConfigError, match="4 layers"):
        MInference({"patterns": str(tmp_path / "patterns.json")}).select(
            q[:, :1], k[:, :1], v[:, :1], case.context()
        )


def test_pattern_files_come_back(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    layers = (
        (HeadPattern("vertical_and_slash", 1000, 6096, 0.75), HeadPattern("stream_llm", 100, 800, 0.5)),
    )
    write_patterns(path, layers)
    assert json.loads(path.read_text())[0]["1"] == ["stream_llm", 100, 800, 0.5]
    assert read_patterns(path) == layers
    write_patterns(path, layers, {"model_type": "qwen3", "num_attention_heads": 2})
    assert read_patterns(path, {"model_type": "qwen3", "hidden_size": 64}) == layers
    with pytest.raises(ConfigError, match="qwen3"):
        read_patterns(path, {"model_type": "llama"})


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "3", '{"best_pattern": []}', '[{"1": ["stream_llm", 1, 2, 3]}]', '[{"0": ["x", 1, 2]}]'],
)
def test_wrong_pattern_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(content)
    with pytest.raises(ConfigError):
        read_patterns(path)
    with pytest.raises(ConfigError, match="no pattern file"):
        read_patterns(tmp_path / "absent.json")


def test_the_search_finds_what_was_planted() -> None:
    _, q, k, _, _, _ = planted(384)
    slash = HeadPattern("vertical_and_slash", 8, 140)
    window = HeadPattern("stream_llm", 8, 140)
    near_q = k[0] * 6
    found = search_heads(torch.cat([q[0], near_q]), k[0], 0.5, (slash, window), first_row=200, rewrite=False)
    assert found[0].kind == "vertical_and_slash" and found[0].score > 0.9
    weights = torch.softmax(
        (q[0, 0] @ k[0, 0].T * 0.5).masked_fill(~torch.ones(384, 384).bool().tril(), -torch.inf), -1
    )
    near = torch.ones(384, 384).bool().tril() & ~torch.ones(384, 384).bool().tril(-140)
    near[:, :8] = True
    lost = float((weights * near)[192:].sum(-1).mean())
    assert search_heads(q[0], k[0], 0.5, (window,), first_row=200, rewrite=False)[0].score == pytest.approx(
        lost, abs=1e-4
    )
    assert search_heads(q[0], k[0], 0.5, (window,))[0].kind == "vertical_and_slash", (
        "as the public files have it"
    )
