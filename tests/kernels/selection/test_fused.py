"""The GPU programs of selection against the selectors' PyTorch code: the same lists; interpreted where there is no GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from angelslim.kernels.attention.blocks import BlockPlan
from angelslim.kernels.selection import fused
from angelslim.methods.sparse import _fused
from angelslim.methods.sparse.plan import Context
from angelslim.methods.sparse.selectors.base import SELECTORS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BLOCK, HEADS, KV_HEADS, WIDTH = 16, 4, 2, 16
CALLS = {
    "whole": (0, 11 * BLOCK, 11 * BLOCK),
    "chunk": (4 * BLOCK, 9 * BLOCK, 20 * BLOCK),
    "one": (0, BLOCK, BLOCK),
}


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> object:
    """Triton reads the variable when the programs' module is imported."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def inputs(keys: int, offset: int, batch: int) -> tuple[torch.Tensor, ...]:
    """Tokens before heads, as models lay them out; some keys and values stand out."""
    torch.manual_seed(keys)
    q = torch.randn(batch, keys - offset, HEADS, WIDTH, device=DEVICE).transpose(1, 2)
    k = torch.randn(batch, keys, KV_HEADS, WIDTH, device=DEVICE).transpose(1, 2)
    v = torch.randn(batch, keys, KV_HEADS, WIDTH, device=DEVICE).transpose(1, 2)
    return (
        q,
        k * (1 + torch.rand(keys, 1, device=DEVICE)),
        v * torch.rand(keys, 1, device=DEVICE).mul(3).exp(),
    )


def same(first: BlockPlan, second: BlockPlan) -> None:
    """Both plans list the same blocks."""
    assert torch.equal(first.num, second.num.expand_as(first.num))
    assert torch.equal(first.to_mask(), second.to_mask().expand_as(first.to_mask()))


if importlib.util.find_spec("triton") is not None:

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("stem", {"density": 0.3, "stride": 4}),
            ("stem", {"density": 0.5, "stride": 8, "oam": False, "window_blocks": 2}),
            ("union", {"density": 0.4, "last": 16}),
            ("union", {"density": 0.3, "last": 16, "cells": 2}),
        ],
    )
    def test_the_lists_are_those_of_the_pytorch_code(
        method: str, options: dict[str, object], call: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        offset, keys, prompt = CALLS[call]
        q, k, v = inputs(keys, offset, batch=2 if call == "whole" else 1)
        ctx = Context(3, 6, WIDTH**-0.5, offset, prompt, BLOCK, kv_len=keys)
        select = SELECTORS.get(method)(options).select
        used = []
        choose = fused.choose
        monkeypatch.setattr(fused, "choose", lambda *a, **kw: used.append(1) or choose(*a, **kw))
        found = select(q, k, v, ctx)
        assert used
        monkeypatch.setattr(fused, "refuses", lambda *a: "not now")
        same(found, select(q, k, v, ctx))

    def test_fewer_programs_join_as_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
        q, k, _ = inputs(20 * BLOCK, 0, batch=2)
        many = fused.last_lines(q, k, 16, BLOCK, 0.3)
        monkeypatch.setattr(fused, "JOINERS", 1)
        for one, other in zip(fused.last_lines(q, k, 16, BLOCK, 0.3), many, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(many.shares.sum(-1), many.mean)

    def test_ties_are_broken_and_lists_end_in_zeros() -> None:
        score = torch.zeros(1, 1, 6, 6, device=DEVICE)
        score[..., 3] = -1.0
        count = torch.tensor([[[1, 2, 2, 3, 3, 4]]], dtype=torch.int32, device=DEVICE)
        plan = fused.choose(score, count, 4, block=BLOCK, q_offset=0, forced=fused.Forced())
        expected = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 1, 3, 0], [0, 1, 4, 0], [0, 1, 2, 5]]
        assert plan.idx[0, 0].tolist() == expected
        assert plan.num[0, 0].tolist() == [1, 2, 2, 3, 3, 4]

    def test_dense_rows_and_blocks_on_top() -> None:
        score = torch.randn(1, 2, 8, 8, device=DEVICE)
        count = torch.full((1, 1, 8), 3, dtype=torch.int32, device=DEVICE)
        plan = fused.choose(
            score, count, 8, block=BLOCK, q_offset=0, forced=fused.Forced(1, 1, 2, 2, dense_rows=1)
        )
        mask = plan.to_mask()
        assert mask[:, :, 7].all() and mask[:, :, 1:, :2].all() and mask[0, :, 5, 4:6].all()


if GPU:

    @pytest.mark.parametrize("method", ["stem", "union"])
    def test_in_16_bits_nearly_all_blocks_are_those_of_the_pytorch_code(
        method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(1, 4096, heads, 128, device=DEVICE).bfloat16().transpose(1, 2) for heads in (8, 2, 2)
        )
        ctx = Context(18, 36, 128**-0.5, 0, 4096, 128)
        select = SELECTORS.get(method)({"density": 0.3}).select
        one = select(q, k, v, ctx).to_mask()
        monkeypatch.setattr(fused, "refuses", lambda *a: "not now")
        other = select(q, k, v, ctx).to_mask()
        assert one.sum() == other.sum()
        assert (one & other).sum() > 0.95 * one.sum()


def test_it_says_what_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(5 * BLOCK, 0, 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.refuses(q, k, v, BLOCK, 0) == ""
    assert "whole blocks" in fused.refuses(q[:, :, 1:], k, v, BLOCK, 1)
    assert "float64" in fused.refuses(q.double(), k, v, BLOCK, 0)
    assert "powers of two" in fused.refuses(q, k, v, 5, 0)
    assert not _fused.ready(q, k, v, Context(0, 1, 1.0, 0, 80, BLOCK, kv_start=torch.zeros(1)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in fused.refuses(q, k, v, BLOCK, 0)
