"""The reference kernel against attention written token by token."""

from __future__ import annotations

import pytest
import torch

from angelslim.kernels.attention import dense
from angelslim.kernels.attention.blocks import BlockPlan

from .cases import DEVICE, PADDED, SHAPES, WIDE, make, oracle


@pytest.mark.parametrize("name", [*SHAPES, *PADDED, *WIDE])
def test_it_is_attention_over_the_listed_tokens(name: str) -> None:
    case = make({**SHAPES, **PADDED, **WIDE}[name], torch.float64)
    out = dense.run(case.q, case.k, case.v, case.plan, scaling=0.3, kv_start=case.start, kv_stop=case.stop)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.cpu(), oracle(case, 0.3), rtol=1e-10, atol=1e-10)


def test_all_blocks_are_causal_attention() -> None:
    case = make(SHAPES["odd length"], torch.float32)
    plan = BlockPlan.full(block_q=16, block_k=16, q_offset=0, kv_len=77, device=DEVICE)
    out = dense.run(case.q, case.k, case.v, plan, scaling=0.2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.q, case.k, case.v, is_causal=True, scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(out, expected)


def test_what_is_not_listed_has_no_influence() -> None:
    case = make(SHAPES["diagonal alone"], torch.float32)
    before = dense.run(case.q, case.k, case.v, case.plan, scaling=0.2)
    case.v[:, :, :16] += 100.0
    after = dense.run(case.q, case.k, case.v, case.plan, scaling=0.2)
    torch.testing.assert_close(after[:, :, 16:], before[:, :, 16:])
    assert (after[:, :, :16] - before[:, :, :16]).abs().min() > 50
